"""Configuration: what is read, what is refused, and that a refusal is one line, exit code 2, and no Ray."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from orchestration.cli import main as cli
from orchestration.cluster.ray_cluster import Machine
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.preflight import describe_ddpo, preflight_ddpo
from orchestration.runs.config import ConfigError, load_config
from pipelines.generators import GENERATORS
from pipelines.generators.text_to_image import TextToImageSettings
from pipelines.storage.locations import CHECKOUT
from policies.rl.settings import Settings, TrainingSettings, known_keys, tupled

DIGITS = CHECKOUT / "configs/ddpo/digits.yaml"


def command(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of ``ouroboros`` with ``arguments``, run in this process."""
    monkeypatch.setattr(sys, "argv", ["ouroboros", *arguments])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    try:
        cli.main()
    except SystemExit as leave:
        return int(leave.code or 0)
    return 0


WRONG = {
    "unknown key": (["trainin.steps=3"], "did you mean 'training.steps'"),
    "unknown nested key": (["training.learning_rat=1e-4"], "did you mean 'training.learning_rate'"),
    "override without value": (["training.steps"], "is not key=value"),
    "override below a value": (["seed.steps=3"], "seed"),
    "override that is not YAML": (["name=[a"], "not YAML"),
    "text for a number": (["training.steps=many"], "training.steps"),
    "fraction for a count": (["training.steps=2.5"], "training.steps"),
    "negative count": (["training.steps=-1"], "training.steps"),
    "zero learning rate": (["training.learning_rate=0"], "training.learning_rate"),
    "negative seed": (["seed=-1"], "seed"),
    "only a deterministic step": (["sampling.steps=1"], "no step with a density"),
    "no noise": (["sampling.eta=0"], "sampling.eta"),
    "too much noise": (["sampling.eta=1.5"], "sampling.eta"),
    "noise that moves in no known way": (["sampling.eta={slidng: [1, 0.3, 2]}"], "did you mean 'sliding'?"),
    "noise that never moves": (
        ["sampling.eta={sliding: [1, 0.3, 0]}"],
        "sampling.eta.sliding.2: Input should be greater than",
    ),
    "noise that moves to where no density is": (["sampling.eta={random: [1, 0.1, 1]}"], "no step with a density"),
    "no steps behind the noise": (["sampling.eta=[1, 0, 0.3]", "sampling.steps=[10, 0]"], "sampling.steps.1: "),
    "coarser steps without a part": (["sampling.steps=[10, 3]"], "for noise in a part of them"),
    "a baseline with a slip": (["advantage.baseline={histor: 3}"], "did you mean 'history'?"),
    "a history of one": (
        ["advantage.baseline={history: 1}"],
        "advantage.baseline.history: Input should be greater than or equal to 2",
    ),
    "guidance below one": (["sampling.guidance_scale=0.5"], "sampling.guidance_scale"),
    "unknown objective": (["training.objective=ppo"], "training.objective"),
    "unknown dtype": (["model.dtype=int8"], "model.dtype"),
    "name with a slash": (["name=a/b"], "name"),
    "group does not divide": (["training.images_per_prompt=7"], "must be a multiple of images_per_prompt"),
    "updates do not divide": (["training.updates_per_step=3"], "must be a multiple of updates_per_step"),
    "score function off policy": (["training.objective=score_function"], "on-policy"),
    "score function over again": (
        ["training.objective=score_function", "training.updates_per_step=1", "training.inner_epochs=2"],
        "on-policy",
    ),
    "more prompts than there are": (
        ["training.images_per_step=1024", "training.images_per_prompt=4"],
        "256 prompts a step",
    ),
    "a group of one": (["training.images_per_prompt=1", "training.images_per_step=128"], "images of one prompt"),
    "interim larger than all": (["evaluation.interim_images=2000"], "interim_images"),
    "a window without steps": (["training.timestep_window=[0.95, 1.0]"], "no step with a density"),
    "a window backwards": (["training.timestep_window=[0.5, 0.2]"], "is not a part of 0 to 1"),
    "a divergence without densities": (["training.objective=negative_aware", "training.kl_weight=0.1"], "no density"),
    "missing prompts": (["prompts=no/such/file.txt"], "no file"),
    "prompts that are a directory": (["prompts=configs"], "no file"),
    "missing model": (["model.path=no_such_model"], "no directory"),
    "model directory with a slip": (["model.path=models/digts"], "no directory 'models/digts'"),
    "hub name without a hub": (["model.path=nobody/nothing"], "HF_HUB_OFFLINE"),
    "model directory without a model": (["model.path=configs"], "model_index.json"),
    "missing captioner": (["captioner.path=nowhere"], "no directory"),
    "captions asked of nobody": (["captioner.path=null"], "captioner.path is null"),
    "captions longer than the captioner": (["captioner.max_new_tokens=4000"], "positions"),
    "missing evaluator": (["evaluation.evaluator=nowhere"], "no directory"),
    "missing encoder": (["reward.options.sentence_cosine.model=nowhere"], "no directory"),
    "unknown option of a reward": (["reward.options.sentence_cosine.modle=x"], "did you mean 'model'"),
    "option of a reward that is not used": (["reward.options.bertscore_f1.model=x"], "neither in function nor"),
    "held out and trained on": (["reward.held_out=[sentence_cosine]"], "is trained on"),
    "reward of no weight": (["reward.function={sentence_cosine: 0}"], "weights that are finite and not 0"),
    "reward that is no path": (["reward.function=niceness"], "import path"),
    "reward in a missing module": (["reward.function=no_such_module:f"], "cannot be imported"),
    "reward that a module lacks": (["reward.function=math:niceness"], "has no 'niceness'"),
    "reward that cannot be called": (["reward.function=math:pi"], "cannot be called"),
    "a reward of two arguments": (
        ["reward.function=tests.rewards:two_arguments"],
        "takes (images: numpy.ndarray, prompts: collections.abc.Sequence[str])",
    ),
    "a reward without its option": (["reward.function=tests.rewards:jitter"], "missing a required argument: 'size'"),
    "a reward with another option": (
        ["reward.function=tests.rewards:jitter", "reward.options={tests.rewards:jitter: {sise: 3}}"],
        "did you mean 'size'",
    ),
    "a reward that is async": (["reward.function=tests.rewards:later"], "async or yields"),
    "a reward that yields": (["reward.function=tests.rewards:one_by_one"], "async or yields"),
    "a class without its argument": (["reward.function=tests.rewards:Holds"], "missing a required argument: 'path'"),
    "a class with another option": (
        [
            "reward.function=tests.rewards:Holds",
            "reward.options={tests.rewards:Holds: {path: x, wieght: 2}}",
        ],
        "did you mean 'weight'",
    ),
    "a class whose instances cannot be called": (
        ["reward.function=tests.rewards:NeverCalled"],
        "has no __call__(self, images, prompts, captions)",
    ),
    "a class whose instances take two arguments": (
        ["reward.function=tests.rewards:AskedForTwo"],
        "too many positional arguments",
    ),
    "a layer that no encoder has": (
        ["reward.function=bertscore_f1", "reward.options.bertscore_f1.layer=40"],
        "layer is 40, but",
    ),
    "a key that is not there": (
        ["reward.function=http", "reward.options.http={url: 'http://127.0.0.1:9', api_key_variable: NO_SUCH_KEY}"],
        "the environment has no NO_SUCH_KEY",
    ),
    "prompts without a fact": (
        ["reward.function=strict", "reward.options.strict.ignored=a red seven on black background"],
        "holds no word but those that are ignored",
    ),
    "questions that are nowhere": (
        [
            "reward.function=blip_vqa",
            "reward.options.blip_vqa.model=models/digits/captioner",
            "reward.options.blip_vqa.questions=configs/ddpo/digits.yaml",
        ],
        "digits.yaml is not a mapping of prompts to lists",
    ),
    "a captioner that is none": (["captioner.path=models/digits/evaluator"], "is no model of BLIP or BLIP-2"),
    "GPU where there is none": (["actors.device=cuda"], "no GPU was found"),
    "too many threads": (["actors.placement=spread", "actors.threads.sampler=64"], "CPUs"),
    "too many samplers": (["actors.placement=spread", "actors.samplers=99"], "CPUs"),
    "absurdly many samplers": (["actors.samplers=5000"], "cannot share"),
    "tracking to nowhere": (["tracking.uri=ftp://server"], "tracking: uri"),
    "output in a file": (["output_dir=pyproject.toml"], "not an empty directory"),
    "output in a used directory": (["output_dir=configs"], "not an empty directory"),
    "no commit kept": (["checkpoint.keep=0"], "1 at least"),
    "commits kept by a word": (["checkpoint.keep=some"], 'a size such as "20 GB"'),
    "a rate without an end": (["training.learning_rate=.inf"], "training.learning_rate: inf is no finite number"),
    "a key of a thousand blocks": (["a." * 5000 + "b=1"], "has 5000 dots"),
    "a name for a terminal": (['name="\\e]0;x\\a"'], "name: the character"),
    "LoRA of negative rank": (["model.lora_rank=-4"], "model.lora_rank"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_line_and_exit_code_2(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    overrides, expected = WRONG[case]
    monkeypatch.chdir(CHECKOUT)
    before = set(Path("runs").glob("*"))
    assert command(["ddpo", "--config", str(DIGITS), *overrides], monkeypatch) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1, message
    assert not ray.is_initialized()
    assert set(Path("runs").glob("*")) == before


LETTERS = list(zip("abcdefgh", "bcdefghi", strict=True))


def test_a_file_of_the_checkout_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(DdpoConfig, Path("configs/ddpo/digits.yaml")).name == "digits"
    (tmp_path / "configs/ddpo").mkdir(parents=True)
    (tmp_path / "configs/ddpo/digits.yaml").write_text("name: nearer")
    assert load_config(DdpoConfig, Path("configs/ddpo/digits.yaml")).name == "nearer"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training: [1, 2", "not YAML that can be used: .*line 1"),
        ("- 1\n- 2", "holds a list"),
        ("training: 3", "training"),
        ("name: &x [*x]", r"refers to itself \(line 1\)"),
        (
            "a: &a {k: x}\n" + "\n".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]" for a, b in LETTERS),
            "more than 30,000",
        ),
        ("a: &a {k: x}\n" + "\n".join(f"{b}: &{b} {{<<: [{','.join([f'*{a}'] * 9)}]}}" for a, b in LETTERS), "30,000"),
        ("name: " + "[" * 60, "nested more than 50 deep"),
        ("training:\n  steps: 1\n  steps: 2", r"key 'steps' stands twice \(line 2\)"),
        ("seed: 1\nseed: 2", "key 'seed' stands twice"),
        ("\tseed: 1", r"'\\t' that cannot start"),
        ("name: 2026-13-45", "month must be in"),
        ("name: 2026-11-28", "name: 2026-11-28 is a date; write text in quotes"),
        ("7: 1", "7 is no key"),
        ("training: {learning_rate: .inf}", r"training\.learning_rate: inf is no finite number"),
        ("sampling: {eta: .nan}", r"sampling\.eta: nan is no finite number"),
        ("training: {clip_range: 1e999}", r"training\.clip_range: inf is no finite number"),
        ("seed: " + "9" * 40, "seed: a whole number has 64 bits"),
        ("seed: " + "9" * 5000, "4300 digits"),
        ('output_dir: "a\\0b"', r"output_dir: the character '\\x00' cannot be part"),
        ('prompts: "\\e[2J"', r"prompts: the character '\\x1b'"),
        ('"tra\\e[2Jining": 1', r"'tra\\x1b\[2Jining' is no key"),
        ('name: "a\\n"', "name: a name has letters"),
        ("name: " + "ø" * 80, "name: a name has letters"),
        ("name: ..", "name: a name has letters"),
        (b"name: \xff", r"it is not UTF-8 text \(byte 6\)"),
        (b"# " + b"x" * 2**20, "more than 1,048,576 bytes"),
    ],
)
def test_bad_files_are_refused(text: str | bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=expected) as refusal:
        load_config(DdpoConfig, path)
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 500
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(DdpoConfig, tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(DdpoConfig, tmp_path / "other.yaml")


def test_numbers_are_finite_and_words_are_kept(tmp_path: Path) -> None:
    """Also where no file is read; and what is quoted is text, what is merged or shared is written out."""
    for other in ("010", "1:30", "-017", "1:30.5"):  # 8, 90, -15 and 90.5 in YAML 1.1
        with pytest.raises(ConfigError, match="is no number"):
            load_config(DdpoConfig, None, [f"training.steps={other}"])
    assert load_config(DdpoConfig, None, ["training.steps=1_000", "seed=0"]).training.steps == 1000
    for infinite in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match="finite number"):
            TrainingSettings(learning_rate=infinite)
    path = tmp_path / "config.yaml"
    path.write_text(
        "\ufeffname: '1e-4'\ntraining: {<<: &own {steps: 7}, learning_rate: 3e-4}\n"
        "reward: {function: {'m:a': 1, 'm:b': 1}, options: {'m:a': &o {x: 1}, 'm:b': *o}}\n",
        encoding="utf-8",
    )
    config = load_config(DdpoConfig, path, ["reward.options.m:a.x=2"])
    assert (config.name, config.training.steps, config.training.learning_rate) == ("1e-4", 7, 3e-4)
    assert config.reward.options == {"m:a": {"x": 2}, "m:b": {"x": 1}}


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"name: !!python/object/apply:os.mkdir ['{tmp_path}/pwned']")
    with pytest.raises(ConfigError, match="not YAML"):
        load_config(DdpoConfig, path)
    assert not (tmp_path / "pwned").exists()


def test_unknown_prompts_for_the_evaluator_are_named(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a wolf riding a bike\n")
    config = load_config(DdpoConfig, DIGITS, [f"prompts={prompts}", "training.images_per_step=8"])
    with pytest.raises(ConfigError, match="wolf"):
        preflight_ddpo(config)


@pytest.mark.parametrize(("text", "expected"), [("", "holds no prompt"), ("a\na\n", "repeats 1")])
def test_prompt_files_are_checked(text: str, expected: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        preflight_ddpo(load_config(DdpoConfig, DIGITS, [f"prompts={prompts}"]))


def test_overrides_reach_their_keys_and_round_trip(tmp_path: Path) -> None:
    config = load_config(DdpoConfig, DIGITS, ["training.learning_rate=3e-5", "model.lora_targets=[to_q]", "seed=7"])
    assert config.training.learning_rate == 3e-5
    assert config.model.lora_targets == ("to_q",)
    path = tmp_path / "resolved.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(DdpoConfig, path) == config


def test_every_ready_made_config_is_valid_and_small() -> None:
    assert len(known_keys(DdpoConfig)) < 60
    for path in sorted((CHECKOUT / "configs/ddpo").glob("*.yaml")):
        assert load_config(DdpoConfig, path).training.steps > 0


def test_dry_run_prints_the_arithmetic_and_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    monkeypatch.chdir(CHECKOUT)
    arguments = ["ddpo", "--config", str(DIGITS), "--dry-run", "training.images_per_step=96", "actors.samplers=3"]
    assert command(arguments, monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "12 prompts × 8 images = 96 images a step" in printed
    assert "3 × sampler" in printed
    assert "4 of 9 learnable timesteps" in printed
    assert "GB" in printed
    assert not ray.is_initialized()


def test_memory_estimate_counts_every_actor() -> None:
    config = load_config(DdpoConfig, DIGITS)
    few, many = (
        describe_ddpo(c, preflight_ddpo(c, Machine(cpus=64, gpus=0)))
        for c in (config, config.model_copy(update={"actors": config.actors.model_copy(update={"samplers": 20})}))
    )
    total = [float(text.rsplit("together ", 1)[1].split(" GB")[0]) for text in (few, many)]
    assert total[1] > total[0] + 18 * 0.5


def test_a_refusal_needs_neither_ray_nor_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from orchestration.cli import main as cli; sys.argv = ['ouroboros', 'ddpo', 'training.steps=0']\n"
        "try: cli.main()\n"
        "except SystemExit as leave: print(leave.code, sorted({'ray', 'torch', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=CHECKOUT)
    assert done.stdout.strip() == "2 []"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["mad", "--config", "configs/ddpo/digits.yaml"], "digits.yaml configures ddpo: give it to 'ouroboros ddpo'"),
        (["ddpo", "--config", "configs/mad/gaussian.yaml"], "gaussian.yaml configures mad"),
        (["ddpo", "--config", "configs/sweeps/rewards.yaml", "seed=x"], "rewards.yaml configures sweep"),
        (["sweep", "--config", "configs/mad/gan.yaml"], "gan.yaml configures mad"),
        (["mad", "training.steps=20"], "training.steps is a setting of ddpo, not of mad"),
        (["mad", "seed=3"], "seed is a setting of ddpo and sweep, not of mad; did you mean 'seeds'?"),
        (["sweep", "search=gird"], "(did you mean 'grid'?), not 'gird'"),
        (["sweep", "configs/sweeps/gaussian_phase.yaml"], "give a file as --config configs/sweeps/gaussian_phase.yaml"),
        (["mad", "fresh_fraction=1.4"], "fresh_fraction: Input should be less than or equal to 1, not 1.4"),
        (["ddpo", "training=3"], "training: a block of keys, such as training.steps, not 3"),
        (["mad", "--config", "configs/mad/gan.yaml", "sede=1"], "unknown key 'sede'"),
    ],
)
def test_a_configuration_of_another_loop_is_called_what_it_is(
    words: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(CHECKOUT)
    assert command([*words, "--dry-run"], monkeypatch) == 2
    assert told in capsys.readouterr().err


def test_the_version_is_that_of_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["--version"], monkeypatch) == 0
    assert capsys.readouterr().out == f"ouroboros {version('ouroboros-rl')}\n"


def test_an_error_cannot_speak_to_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["ddpo", "--config", str(tmp_path / "\x1b[2Jno.yaml")], monkeypatch) == 2
    assert r"\x1b[2Jno.yaml cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("name", GENERATORS.built_in)
def test_settings_read_what_tasks_and_files_hold_of_them(name: str) -> None:
    """Both have lists where settings have tuples."""
    schema = GENERATORS.built_in[name].schema
    assert schema(**json.loads(schema().model_dump_json())) == schema()


def test_tuples_are_read_from_lists_however_deep() -> None:
    cached = TextToImageSettings(sampling_steps=(20, 2, 0))
    assert TextToImageSettings(**json.loads(cached.model_dump_json())) == cached
    assert cached.cache == TextToImageSettings.model_validate_json(cached.model_dump_json()).cache == (2, 0)
    assert tupled({"a": [1, [2, {"b": [3]}]]}) == {"a": (1, (2, {"b": (3,)}))}


def test_a_setting_of_lists_is_refused_where_it_is_written() -> None:
    """As settings read lists as tuples, which it would take for a wrong type."""
    with pytest.raises(TypeError, match=r"Lists.values .*tuple\[T"):
        type("Lists", (Settings,), {"__annotations__": {"values": list[int] | None}, "values": None})
    type("Others", (Settings,), {"__annotations__": {"listed": tuple[int, ...]}, "listed": ()})
