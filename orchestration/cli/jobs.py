"""``ouroboros jobs``: look after the jobs of a cluster."""

from pathlib import Path

import typer

from orchestration.cli.options import Address, Changes, Follow, JobId, Json, NewId, Trust
from orchestration.runs.display import Terminal

jobs_app = typer.Typer(help="Look after the jobs of a cluster.", no_args_is_help=True)


@jobs_app.command("list")
def list_jobs(address: Address = None, as_json: Json = False) -> None:
    """One line a job."""
    from orchestration.cluster.jobs import connect, facts, render_jobs

    Terminal().show(facts(connect(address).list_jobs()), render_jobs, as_json)


@jobs_app.command()
def logs(job_id: JobId, address: Address = None, follow: Follow = False) -> None:
    """What a job has logged."""
    from orchestration.cluster.jobs import attend, connect

    cluster = connect(address)
    if follow:
        raise typer.Exit(attend(cluster, job_id))
    print(cluster.get_job_logs(job_id), end="")


@jobs_app.command()
def stop(job_id: JobId, address: Address = None) -> None:
    """Stop a job. Its last commit stands, and its MLflow run is closed."""
    from orchestration.cluster.jobs import connect
    from orchestration.cluster.jobs import stop as stop_job

    details = stop_job(connect(address), job_id)
    hint = f"; go on with: ouroboros jobs resume {job_id}" if details.status == "STOPPED" else ""
    print(f"{job_id} is {details.status.value.lower()}{hint}")


@jobs_app.command("resume")
def resume_job(
    job_id: JobId,
    address: Address = None,
    new_id: NewId = None,
    follow: Follow = True,
    trust: Trust = False,
    accept_changes: Changes = False,
) -> None:
    """Go on with the run that a job made, in a new job."""
    from orchestration.cluster.jobs import Job, connect, launch, packed, run_of

    run = run_of(connect(address), job_id)
    flags = [*(["--trust"] if trust else []), *(["--accept-changes"] if accept_changes else [])]
    job = Job.resume(["resume", run, *flags], run, new_id)
    raise typer.Exit(launch(job, packed(Path.cwd()), address, follow))
