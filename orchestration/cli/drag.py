"""``ouroboros drag``: move points of an image to where they should be."""

from pathlib import Path
from typing import Annotated

import typer

from orchestration.cli.options import Root, Trust
from orchestration.runs.browse import find_run
from orchestration.runs.display import Terminal


def drag(
    source: Annotated[str, typer.Argument(metavar="RUN|DIRECTORY", help="a MAD run, or a study's product, of a GAN")],
    begin: Annotated[list[str], typer.Option("--from", metavar="X,Y", help="a point, in pixels; may be repeated")],
    end: Annotated[list[str], typer.Option("--to", metavar="X,Y", help="where it is to go; one for each --from")],
    mask: Annotated[Path | None, typer.Option(help="picture of the images' size: white what may change")] = None,
    image: Annotated[
        Path | None, typer.Option(help="picture of that size that is drawn again first, and dragged")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="what it draws, if it has learned from captions")] = None,
    seed: Annotated[int, typer.Option(help="seed of the image")] = 0,
    arm: Annotated[str | None, typer.Option(help="of the run; none: the first one that can be dragged")] = None,
    run_seed: Annotated[int | None, typer.Option(help="seed of the arm; none: its first")] = None,
    generation: Annotated[int | None, typer.Option(help="of the run; none: the last that is stored")] = None,
    steps: Annotated[int, typer.Option(min=1, help="updates, at most")] = 200,
    output: Annotated[Path, typer.Option(help="directory for a strip (PNG) and an animation (GIF)")] = Path("dragged"),
    root: Root = Path("runs"),
    trust: Trust = False,
) -> None:
    """Move points of an image that a GAN draws to where they should be (DragGAN)."""
    from orchestration.experiments.mad.drag import drag as pull
    from policies.drag import DragSettings

    place = Path(source).expanduser()
    if not place.exists() and place.parent == Path():
        place = find_run(source, root).directory
    chosen = arm, run_seed, generation
    settings = DragSettings(steps=steps)
    found = pull(place, begin, end, mask, image, prompt, chosen, seed, settings, output, trust)
    say = Terminal().print
    if found.error is not None:
        say(f"drawn again with a mean error of {found.error:.3f} of pixels in [0, 1]")
    for start, target, (x, y), left in zip(begin, end, found.points, found.distances, strict=True):
        say(f"{start} → {x:.1f},{y:.1f}: {left:.2f} pixels from {target}, by its features")
    say(f"{'arrived' if found.arrived else 'not arrived'} after {found.updates} updates")
    for path in found.files:
        print(path)
