"""A study: arms × seeds of tasks → what they measure → claims.

The study's own code makes the whole graph before anything runs, each task named by the hash of what it depends on. Ray
does what is not stored yet, arms and seeds beside each other. The same command again goes on.
"""

from pathlib import Path

from orchestration.experiments.study.config import Study
from orchestration.experiments.study.preflight import preflight_study
from orchestration.experiments.study.report import report
from orchestration.experiments.study.run import StudyRun
from pipelines.studies import perform


def run_study(config: Study, trusted: bool = False, changes: bool = False) -> Path:
    """Run a study, or go on with it. Returns the path of summary.json. Raises ConfigError before it starts, also if
    another began it and it is not ``trusted``, or it would read other things and no ``changes`` are accepted.
    """
    plan = preflight_study(config)
    with StudyRun(config, plan, trusted, changes) as run:
        run.perform(perform, plan.reported, plan.gpus, plan.resources)
        return report(run)
