"""Resources of the cluster for all actors of a run at once or for none: runs cannot hold each other up half started.

A run that is inside a placement group already, a sweep's trial, lives in that one.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util import get_current_placement_group, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.allocation import Offer, Role, allocate
from actors.failures import ActorLost

_CHECK_SECONDS = 2.0
_MOVE_SECONDS = 10.0  # for Ray to move what was on a lost node to others


@dataclass(frozen=True)
class Placed:
    """A role, and for each of its actors the part of the reservation that is its own."""

    role: Role
    places: list[PlacementGroupSchedulingStrategy]


class Reservation:
    """A Ray placement group with the bundles of all actors of ``roles``, which were planned for ``offers``.

    In a group that this process lives in already, ``offers`` are its bundles, and each actor takes its part of one.
    """

    def __init__(self, roles: Sequence[Role], offers: Sequence[Offer]) -> None:
        self._roles, self._bundles = roles, allocate(roles, offers)
        self._next_check = self._whole = time.monotonic()
        self._outer: Any = get_current_placement_group()
        demands = [bundle.demand for bundle in self._bundles]
        self._group: Any = None if self._outer else placement_group(demands, strategy="SPREAD")

    def wait(self, timeout: float, meanwhile: Callable[[], None], *, for_new_nodes: bool = True) -> None:
        """Return once it is there; ``meanwhile`` is called every second.

        Raises TimeoutError saying what is missing, and ActorLost if a node goes away unless ``for_new_nodes`` to come.
        """
        deadline, nodes = time.monotonic() + timeout, _alive()
        while self._group is not None and not self._group.wait(1):
            meanwhile()
            if nodes - _alive() and not for_new_nodes:
                raise ActorLost("a node that this run was planned for is gone")
            if time.monotonic() > deadline:
                wanted = "; ".join(f"{role.count} × {role.described}" for role in self._roles)
                names = dict.fromkeys(name for bundle in self._bundles for name in bundle.demand)
                free = ", ".join(f"{ray.available_resources().get(name, 0):g} {name}" for name in names)
                raise TimeoutError(
                    f"no room on the cluster within {timeout:g} s (actors.timeout_seconds) for {wanted}; free: {free}"
                )

    def check(self) -> None:
        """Raise ActorLost if a part of it was on a node that is gone, and Ray found no other place for it."""
        now = time.monotonic()
        if self._group is None or now < self._next_check:
            return
        self._next_check = now + _CHECK_SECONDS
        if placement_group_table(self._group)["state"] == "CREATED":
            self._whole = now
        elif now - self._whole > _MOVE_SECONDS:
            raise ActorLost(f"a node of this run is gone, and the others had no room for {_MOVE_SECONDS:g} s")

    def placed(self) -> dict[str, Placed]:
        """By the name of the role."""
        placed = {role.name: Placed(role, []) for role in self._roles}
        for number, bundle in enumerate(self._bundles):
            place = PlacementGroupSchedulingStrategy(
                self._group or self._outer, placement_group_bundle_index=number if self._group else bundle.node
            )
            for name in bundle.names():
                placed[name].places.append(place)
        return placed

    def release(self) -> None:
        """Give it back."""
        if self._group is not None:
            remove_placement_group(self._group)


def _alive() -> set[str]:
    """The nodes that Ray takes to be there."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}
