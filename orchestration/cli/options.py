"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer


def _check_id(job: str | None) -> str | None:
    if job is not None:
        from orchestration.cluster.jobs import check_id

        check_id(job)
    return job


def runs(ctx: typer.Context, incomplete: str) -> list[str]:
    """What a shell may complete a RUN to."""
    from orchestration.runs.browse import run_names

    return [name for name in run_names(Path(ctx.params.get("root") or "runs")) if name.startswith(incomplete)]


Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="settings, such as name=first")]
File = Annotated[list[Path] | None, typer.Option(help="YAML file; of several the later wins; none: all defaults")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print what would be run, and stop")]
Server = Annotated[str | None, typer.Option(help="MLflow server; the same as tracking.uri=…")]
_A_RUN: Any = {"help": "a run's directory, its name, or the beginning of just one name", "autocompletion": runs}
RunName = Annotated[str, typer.Argument(metavar="RUN", **_A_RUN)]
RunNames = Annotated[list[str], typer.Argument(metavar="RUN", **_A_RUN)]
Root = Annotated[Path, typer.Option(help="where the runs are")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document, numbers in full")]
Address = Annotated[str | None, typer.Option(help="job server; else RAY_API_SERVER_ADDRESS, RAY_ADDRESS, this machine")]
JobId = Annotated[
    str, typer.Argument(metavar="ID", callback=_check_id, help="as submit printed it; see 'ouroboros jobs list'")
]
NewId = Annotated[
    str | None, typer.Option("--id", callback=_check_id, help="name of the job; without it, one with the time")
]
Trust = Annotated[bool, typer.Option("--trust", help="act on it, and import what it names, though another began it")]
Changes = Annotated[bool, typer.Option("--accept-changes", help="go on though what it reads has changed; recorded")]
Follow = Annotated[bool, typer.Option("--follow/--no-follow", help="print what the job logs, and end as it ends")]
