"""Images and tones that are drawn for each other, together, and without a pair of them in training: tasks of the study
``any_to_any``, after CoDi (:mod:`policies.any_to_any`, :mod:`pipelines.joint_attention`).

The image model and the text encoder are those of a stock pipeline, and frozen; the tone model is a stock UNet that the
study trains. Everything is a function of the pipeline, the settings and the seed.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional

from pipelines.captioner import Captioner
from pipelines.data.digits import DIGITS, GROUNDS, INKS, all_prompts, parse, real_images
from pipelines.data.tones import CLEAR, SHAPE, Heard, Tones, decode, folded, shown, sound, tones, unfolded, wav, words
from pipelines.default_models.batches import DigitBatches, prompt_indices
from pipelines.denoisers import load_family
from pipelines.editing import as_bytes
from pipelines.figures.dragging import strip
from pipelines.joint_attention import Encoder, Joint
from pipelines.measures.evaluator import load_evaluator, to_network_input
from pipelines.scoring import captioned
from pipelines.settings import CaptionerSettings
from pipelines.storage.atomic import Files, packed, unpacked
from pipelines.storage.locations import resolve_model
from pipelines.storage.model_files import load_whole
from pipelines.studies import metrics, products
from pipelines.training import train
from policies.any_to_any import TrainingSettings, agreement_by_chance, contrast, mixed, where_decided
from policies.common.seeding import derive_seed
from policies.diffusion.ddim import DenoisingSchedule, ddim_deviation

IMAGE, TONE, TEXT = "image", "tone", "text"
_TONES: dict[str, Any] = {  # the tone model: the image model's classes of block, smaller
    "sample_size": SHAPE[1:],
    "in_channels": SHAPE[0],
    "out_channels": SHAPE[0],
    "block_out_channels": (32, 48),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
_NUMBERS, _LOUD = 48, 2.0  # of a text as it is noised, and their deviation: it is to be lost in noise when images are
_GROUP, _NEAR = 16, 0.2  # pairs of one time, which are told apart; the share of times that are near the end
_TEMPERATURE, _CONTRAST = 0.1, 0.1  # of environments' contrast, and its weight
_DROPPED = 0.15  # of the captions of tones are the empty one
_SURE = 0.8  # the judge's share for a digit from which on an image shows one
_SHOWN = 8  # pairs of a picture
_DESCENT: dict[str, Any] = {"warmup": 0.1, "clip": 1.0, "weight_decay": 0.01}


class World:
    """The frozen models, text states of all captions (180, tokens, width), and of the empty one."""

    def __init__(self, path: str, device: str, made: Files | None = None) -> None:
        """``made``: the tone model, as :func:`learn_tones` left it."""
        self.device = torch.device(device)
        self.family = load_family(path, torch.float32)
        pipeline = self.family.pipeline.to(device)
        self.scheduler, self.vae = pipeline.scheduler, pipeline.vae
        self.networks: dict[str, nn.Module] = {IMAGE: self.family.network}
        if made:
            tone = unpacked(products(made)["tones"], lambda at: load_whole(UNet2DConditionModel, at, device))
            self.networks[TONE] = tone.requires_grad_(False)
        with torch.no_grad():
            texts = [self.family.encode(text, self.device)["encoder_hidden_states"] for text in [*all_prompts(), None]]
        self.states, self.empty = torch.stack(texts[:-1]), texts[-1]
        self.shapes: dict[str, Sequence[int]] = {IMAGE: self.family.latent_shape, TONE: SHAPE, TEXT: (_NUMBERS,)}

    def noisy(self, clean: Tensor, times: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """z_t, and the v that a network is to answer."""
        noise = torch.randn(clean.shape, generator=random).to(clean)
        return self.scheduler.add_noise(clean, noise, times), self.scheduler.get_velocity(clean, noise, times)

    def times(self, count: int, random: torch.Generator, alike: int = 1) -> Tensor:
        """Times (n,), evenly spread, each for so many examples in a row, which are then mostly where it matters."""
        most, places = self.scheduler.config.num_train_timesteps, torch.arange(count // alike)
        shares = (places + torch.rand(len(places), generator=random)) / len(places)
        shares = shares if alike == 1 else where_decided(shares)
        return (most * shares).long().clamp(max=most - 1).repeat_interleave(alike).to(self.device)

    def schedule(self, steps: int) -> DenoisingSchedule:
        """DDIM with all its noise (η = 1), in so many steps, of which most are where it matters."""
        table = self.scheduler.alphas_cumprod.double().cpu()
        times = (
            (where_decided(torch.arange(1, steps + 1) / steps) * len(table)).long().clamp(max=len(table) - 1).flip(0)
        )
        alpha = table[times]
        after = torch.cat([alpha[1:], torch.ones(1, dtype=alpha.dtype)])
        kind = self.scheduler.config.prediction_type
        return DenoisingSchedule(times, alpha, after, ddim_deviation(alpha, after, 1.0), kind, stock=False)

    @torch.no_grad()
    def images(self, count: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Images of the train split (n, 3, 16, 16) in [−1, 1], their latents, and the captions' numbers."""
        pixels, slots = DigitBatches("train").draw(count, random)
        parts = [self.vae.encode(part.to(self.device)).latent_dist.mean for part in pixels.split(256)]
        latents = torch.cat(parts) * self.vae.config.scaling_factor
        return pixels.to(self.device), latents, prompt_indices(slots)

    @torch.no_grad()
    def draw(
        self,
        states: Mapping[str, Tensor],
        steps: int,
        seed: int,
        joint: Joint | None = None,
        to: str = "other",
        scale: float = 1.0,
    ) -> dict[str, Tensor]:
        """What the models draw, each under its text ``states`` (n, tokens, width). With ``joint`` each attends ``to``
        what is seen of the other at the same time; of itself, "own"; of the other in another pair, "strange". What that
        changes is added ``scale`` times, as classifier-free guidance (2207.12598) adds what a text changes."""
        schedule, random = self.schedule(steps).to(self.device), torch.Generator().manual_seed(seed)

        def noise(name: str) -> Tensor:
            return torch.randn((len(states[name]), *self.shapes[name]), generator=random).to(self.device)

        drawn = {name: noise(name) for name in states}
        for step, time in enumerate(schedule.timesteps):
            now, outputs = time.to(self.device), dict[str, Tensor]()
            if joint:
                tokens = {name: joint.seen(name, each, now.expand(len(each))) for name, each in drawn.items()}
                if to == "strange":
                    tokens = {name: each.roll(len(each) // 2, dims=0) for name, each in tokens.items()}
            for name, each in drawn.items():
                outputs[name] = self.networks[name](each, now, states[name], return_dict=False)[0]
                if joint:
                    told = joint(name, each, now, states[name], tokens[name if to == "own" else _other(name)])
                    outputs[name] = outputs[name] + scale * (told - outputs[name])
            for name, each in drawn.items():
                drawn[name] = self.family.step(schedule, step, each, outputs[name], noise(name), 1.0)
        return drawn


def _other(name: str) -> str:
    return TONE if name == IMAGE else IMAGE


class Pool:
    """What is learned from: images and tones by caption, and texts as they are noised."""

    def __init__(self, world: World, parameters: Mapping[str, Any], random: torch.Generator) -> None:
        """``parameters``: how many ``images``, and tones of ``each`` kind; the ``seed``."""
        self.pixels, self.latents, self.captions = world.images(parameters["images"], random)
        self.each: int = parameters["each"]
        known = tones(self.each, derive_seed(parameters["seed"], "tones"))
        self.tones = torch.from_numpy(folded(known.spectrograms)).to(world.device)
        self.kinds = torch.from_numpy(known.digits * len(INKS) + known.inks)  # in order, as many of each
        apart = (world.states - world.states.mean(dim=0)).flatten(1)
        numbers = apart @ torch.linalg.svd(apart, full_matrices=False)[2][:_NUMBERS].T
        self.texts = _LOUD * numbers / numbers.std(dim=0)  # (180, numbers): principal components, alike

    def tones_of(self, kinds: Tensor, random: torch.Generator) -> Tensor:
        """One of each of ``kinds`` (n,)."""
        return self.tones[kinds * self.each + torch.randint(self.each, kinds.shape, generator=random)]


def _captions_of(kinds: Tensor, random: torch.Generator) -> Tensor:
    """Captions (n,) of tones, whatever the ground."""
    return kinds * len(GROUNDS) + torch.randint(len(GROUNDS), kinds.shape, generator=random)


def learn_tones(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: the tone model, under the frozen text encoder, as ``product/tones``."""
    settings, seed = TrainingSettings(**parameters["settings"]), parameters["seed"]
    world, random = World(parameters["path"], device), torch.Generator().manual_seed(derive_seed(seed, "tone model"))
    torch.manual_seed(derive_seed(seed, "tone weights"))
    network = UNet2DConditionModel(**_TONES, cross_attention_dim=world.states.shape[-1]).to(device)
    pool = Pool(world, parameters, random)

    def draw() -> tuple[Tensor, ...]:
        chosen = torch.randint(len(pool.tones), (settings.batch,), generator=random)
        states = world.states[_captions_of(pool.kinds[chosen], random)]
        dropped = torch.rand(settings.batch, generator=random) < _DROPPED
        states = torch.where(dropped.to(device)[:, None, None], world.empty, states)
        times = world.times(settings.batch, random)
        return *world.noisy(pool.tones[chosen], times, random), times, states

    def loss(network: nn.Module, noisy: Tensor, target: Tensor, times: Tensor, states: Tensor) -> Tensor:
        return functional.mse_loss(network(noisy, times, states, return_dict=False)[0], target)

    train(network, draw, loss, settings.steps, settings.rate, **_DESCENT)
    files = packed(network.eval().cpu().save_pretrained)
    return {f"product/tones/{name}": content for name, content in files.items()}


def align(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: encoders of images and of tones into the space of the frozen text encoder, each by pairs with captions, no
    image with a tone. ``shuffled``: the captions are those of others."""
    settings, seed = TrainingSettings(**parameters["settings"]), parameters["seed"]
    world, random = World(parameters["path"], device), torch.Generator().manual_seed(derive_seed(seed, "encoders"))
    pool, middle, found = Pool(world, parameters, random), world.states.mean(dim=0), Files()
    for name in (IMAGE, TONE):
        torch.manual_seed(derive_seed(seed, f"{name} encoder"))
        known = pool.pixels if name == IMAGE else pool.tones
        encoder = Encoder((known.shape[1], known.shape[2], known.shape[3]), world.states).to(device)

        def draw(name: str = name, known: Tensor = known) -> tuple[Tensor, ...]:
            chosen = torch.randint(len(known), (settings.batch,), generator=random)
            captions = pool.captions[chosen] if name == IMAGE else _captions_of(pool.kinds[chosen], random)
            if parameters["shuffled"]:
                captions = captions[torch.randperm(len(captions), generator=random)]
            return known[chosen], world.states[captions], captions if name == IMAGE else captions // len(GROUNDS)

        def loss(encoder: nn.Module, known: Tensor, states: Tensor, kinds: Tensor) -> Tensor:
            return contrast(encoder(known) - middle, states - middle, kinds, parameters["temperature"])

        train(encoder, draw, loss, settings.steps, settings.rate, divisible=False, **_DESCENT)
        found[f"{name}.safetensors"] = save(encoder.cpu().state_dict())
    return found


def join(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: environments and joint attention of an ``arm``, between the frozen models, under the empty prompt. The
    first of ``inputs`` is the tone model.

    Environments meet first, as that is cheap: one of a stream that is being drawn is contrasted with one of another
    that is nearly what it will be, which the first has to foresee. Then all is trained, at the same time in both. What
    a stream is to answer is what its frozen model answers under the caption: the paper's v of the data is that, but
    for noise of no use.

    ``paired``: on images and tones of one caption. ``own``: as paired, but each stream attends to its own environment.
    ``unpaired``: images and noised texts of their captions, which they attend to; then tones and texts, whose
    environments are frozen. No image is seen beside a tone."""
    arm, seed = parameters["arm"], parameters["seed"]
    meeting, settings = (TrainingSettings(**parameters[name]) for name in ("meeting", "settings"))
    world, random = World(parameters["path"], device, inputs[0]), torch.Generator()
    random.manual_seed(derive_seed(seed, "joint"))
    torch.manual_seed(derive_seed(seed, "joint weights"))
    joint = Joint(world.networks, world.shapes, world.states.shape[-1]).to(device).train()
    pool = Pool(world, parameters, random)

    def draw(count: int, names: tuple[str, str], together: bool) -> tuple[Tensor, ...]:
        """Kinds, and of each name times, captions and z_t: at the same time in both, or with one of both near its end,
        where it is known what it is."""
        chosen = torch.randint(len(pool.latents), (count,), generator=random)
        late = world.times(count, random, _GROUP)
        early = (late.max() * _NEAR * torch.rand(count // _GROUP, generator=random)).long().repeat_interleave(_GROUP)
        first = (torch.randperm(count // _GROUP, generator=random) % 2 == 0).repeat_interleave(_GROUP)
        kinds = pool.captions[chosen] // len(GROUNDS)
        heard = _captions_of(kinds, random)
        told = {IMAGE: pool.captions[chosen], TONE: heard, TEXT: heard}
        clean = {IMAGE: pool.latents[chosen], TONE: pool.tones_of(kinds, random), TEXT: pool.texts[heard].to(device)}
        columns = [kinds.to(device)]
        for name, mine in zip(names, (first, ~first), strict=True):
            times = late if together else torch.where(mine.to(device), late, early.to(device))
            columns += [times, told[name], world.noisy(clean[name], times, random)[0]]
        return tuple(columns)

    for names, seen in _plan(arm):

        def met(joint: nn.Module, kinds: Tensor, *columns: Tensor, names: tuple[str, str] = names) -> Tensor:
            assert isinstance(joint, Joint)
            tokens = [joint.seen(name, columns[at + 2], columns[at]) for name, at in zip(names, (0, 3), strict=True)]
            return contrast(tokens[0], tokens[1], kinds, _TEMPERATURE, _GROUP)

        def loss(joint: nn.Module, kinds: Tensor, *columns: Tensor, names: Any = names, seen: Any = seen) -> Tensor:
            assert isinstance(joint, Joint)
            times, captions, noisy = (dict(zip(names, columns[at::3], strict=True)) for at in range(3))
            tokens = {name: joint.seen(name, noisy[name], times[name]) for name in names}
            errors = []
            for name, other in seen.items():
                given, now = noisy[name], times[name]
                with torch.no_grad():
                    wanted = world.networks[name](given, now, world.states[captions[name]], return_dict=False)[0]
                answer = joint(name, given, now, world.empty.expand(len(now), -1, -1), tokens[other])
                errors.append(functional.mse_loss(answer, wanted))
            apart = contrast(tokens[names[0]], tokens[names[1]], kinds, _TEMPERATURE, _GROUP)
            return torch.stack(errors).mean() + _CONTRAST * apart

        for how, learned, together in ((meeting, met, False), (settings, loss, True)):
            draws = partial(draw, how.batch, names, together)
            train(joint, draws, learned, how.steps, how.rate, divisible=False, **_DESCENT)
        joint.environments[TEXT].requires_grad_(False)  # for tones, which come next
    return {"joint.safetensors": save({name: each.contiguous() for name, each in joint.cpu().state_dict().items()})}


def _plan(arm: str) -> list[tuple[tuple[str, str], dict[str, str]]]:
    """In what order an arm learns: which two environments are contrasted, and which streams attend to which."""
    if arm == "unpaired":
        return [((IMAGE, TEXT), {IMAGE: TEXT}), ((TONE, TEXT), {TONE: TEXT})]
    return [((IMAGE, TONE), {name: name if arm == "own" else _other(name) for name in (IMAGE, TONE)})]


class Judged(NamedTuple):
    """What judges see in images, and hear in tones: indices of digits and inks (n,), and whether there is one at all
    (n,); and what they were given, uint8 (n, 16, 16, 3), or spectrograms (n, 48, 8)."""

    digits: np.ndarray
    inks: np.ndarray
    valid: np.ndarray
    given: np.ndarray

    @classmethod
    def of_tones(cls, latents: Tensor) -> "Judged":
        """By arithmetic."""
        given = unfolded(latents.cpu().numpy())
        heard: Heard = decode(given)
        return cls(heard.digits, heard.inks, heard.likeness >= CLEAR, given)

    @classmethod
    @torch.no_grad()
    def of_images(cls, world: World, latents: Tensor, judge: Any) -> "Judged":
        """By the evaluator; no digit is valid that it is not sure of."""
        given = as_bytes(world.family.decode(latents).clamp(-1, 1))
        found = judge.network(to_network_input(given).to(world.device))
        sure = found["digit"].softmax(dim=1).max(dim=1).values.cpu().numpy() >= _SURE
        digits, inks = (found[slot].argmax(dim=1).cpu().numpy() for slot in ("digit", "ink"))
        return cls(digits, inks, sure, given)


def convert(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: what the models draw that are told by encoders what is shown, not by words. ``inputs``: the tone model and
    the encoders, which learned from no pair of an image and a tone.

    ``tone_to_image``, ``image_to_tone``, ``image_and_text_to_tone`` (the mean of both conditions): how often the digit
    is what was shown, of test digits, and tones never heard; ``…/ink`` the same of the ink. ``text_to_…``: by words.
    ``other_text_…``: of an image and a text of another digit, how often the tone is still the image's."""
    world, seed, steps = World(parameters["path"], device, inputs[0]), parameters["seed"], parameters["steps"]
    judge, encoders = load_evaluator(resolve_model(parameters["evaluator"]), device), dict[str, Encoder]()
    prompts = [prompt for prompt in all_prompts() for _ in range(parameters["shown"])]
    rng = np.random.default_rng(derive_seed(seed, "shown"))
    pixels = to_network_input(real_images(prompts, rng)).to(device)
    played: Tones = tones(len(GROUNDS) * parameters["shown"], derive_seed(seed, "tones that are shown"))
    asked = np.repeat(np.arange(len(all_prompts())), parameters["shown"])
    digits, inks = asked // (len(INKS) * len(GROUNDS)), asked // len(GROUNDS) % len(INKS)
    heard = torch.from_numpy(folded(played.spectrograms)).to(device)
    for name, known in ((IMAGE, pixels), (TONE, heard)):
        encoders[name] = Encoder((known.shape[1], known.shape[2], known.shape[3]), world.states).to(device).eval()
        encoders[name].load_state_dict(load(inputs[1][f"{name}.safetensors"]))
    with torch.no_grad():
        from_image, from_tone = encoders[IMAGE](pixels), encoders[TONE](heard)
    text = world.states[torch.from_numpy(asked)]
    other = text.roll(len(asked) // 2, dims=0)  # of another digit
    ways = {
        "image_to_tone": (TONE, from_image, digits, inks),
        "text_to_tone": (TONE, text, digits, inks),
        "image_and_text_to_tone": (TONE, mixed([(from_image, 1.0), (text, 1.0)]), digits, inks),
        "other_text_to_tone": (TONE, mixed([(from_image, 1.0), (other, 1.0)]), digits, inks),
        "tone_to_image": (IMAGE, from_tone, played.digits, played.inks),
        "text_to_image": (IMAGE, text, digits, inks),
    }
    found = dict[str, float]()
    for number, (name, (stream, states, truth, tinted)) in enumerate(ways.items()):
        drawn = world.draw({stream: states}, steps, derive_seed(seed, "converted", number))[stream]
        seen = Judged.of_tones(drawn) if stream == TONE else Judged.of_images(world, drawn, judge)
        found |= {name: float((seen.digits == truth).mean()), f"{name}/ink": float((seen.inks == tinted).mean())}
    return metrics(found)


def draw_together(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: images and tones drawn at once under the empty prompt, each attending to the other, and what they say.
    ``inputs``: the tone model and, but of arm ``independent``, what :func:`join` made.

    ``agreement``: the digit is the same; ``agreement_of_valid``, where both are valid; ``agreement_ink``;
    ``by_chance``, were they paired at random; ``valid/…``: how many show a digit, or sound like a tone, at all;
    ``varied/…``: the entropy of digits, 1 where all are as frequent. ``said``: the captioner's words for the image name
    the tone's digit; ``said_both``, digit and ink: what a rollout of both would be rewarded for. ``told_image``: the
    image is drawn under captions, the tone under none: how often it says their digit; ``told_tone``: the same the other
    way. Pairs to see and to hear."""
    world, seed, count = World(parameters["path"], device, inputs[0]), parameters["seed"], parameters["count"]
    judge, joint = load_evaluator(resolve_model(parameters["evaluator"]), device), None
    if len(inputs) > 1:
        joint = Joint(world.networks, world.shapes, world.states.shape[-1]).to(device).eval()
        joint.load_state_dict(load(inputs[1]["joint.safetensors"]))

    def drawn(states: Mapping[str, Tensor], stream: str) -> tuple[Judged, Judged]:
        how = derive_seed(seed, stream), joint, parameters["to"], parameters["scale"]
        made = world.draw(states, parameters["steps"], *how)
        return Judged.of_images(world, made[IMAGE], judge), Judged.of_tones(made[TONE])

    empty = world.empty.expand(count, -1, -1)
    seen, heard = drawn({IMAGE: empty, TONE: empty}, "together")
    found = {"agreement": np.mean(seen.digits == heard.digits), "agreement_ink": np.mean(seen.inks == heard.inks)}
    found["by_chance"] = agreement_by_chance(torch.from_numpy(seen.digits), torch.from_numpy(heard.digits), len(DIGITS))
    valid = seen.valid & heard.valid
    found["agreement_of_valid"] = (valid & (seen.digits == heard.digits)).sum() / max(1, valid.sum())
    captioner = Captioner(CaptionerSettings(path=parameters["captioner"]), device)
    said = [parse(text) for text in captioned(captioner, seen.given)]
    both = [
        (each["digit"], each["ink"]) == pair for each, pair in zip(said, words(heard.digits, heard.inks), strict=True)
    ]
    found["said"] = np.mean(
        [each["digit"] == digit for each, (digit, _) in zip(said, words(heard.digits, heard.inks), strict=True)]
    )
    found["said_both"] = np.mean(both)
    for name, judged in ((IMAGE, seen), (TONE, heard)):
        share = np.bincount(judged.digits, minlength=len(DIGITS)) / count
        entropy = -(share[share > 0] * np.log(share[share > 0])).sum() / np.log(len(DIGITS))
        found |= {f"valid/{name}": judged.valid.mean(), f"varied/{name}": entropy}
    kinds = torch.arange(len(DIGITS) * len(INKS))
    asked, free = world.states[kinds * len(GROUNDS) + kinds % len(GROUNDS)], world.empty.expand(len(kinds), -1, -1)
    wanted = kinds.numpy() // len(INKS)
    for told in (IMAGE, TONE):
        pair = drawn({name: asked if name == told else free for name in (IMAGE, TONE)}, f"told {told}")
        found[f"told_{told}"] = np.mean(pair[0 if told == TONE else 1].digits == wanted)
    files = metrics({name: float(each) for name, each in found.items()})
    return files | picture(seen.given[:_SHOWN], heard.given[:_SHOWN])


def picture(images: np.ndarray, spectrograms: np.ndarray) -> Files:
    """Pairs side by side, each image above its spectrogram, and the tones one after the other."""
    above = [Image.fromarray(each).resize((128, 128), Image.Resampling.NEAREST) for each in images]
    below = [Image.fromarray(each).resize((128, 192), Image.Resampling.NEAREST) for each in shown(spectrograms)]
    pairs = []
    for one, other in zip(above, below, strict=True):
        pairs.append(Image.new("RGB", (128, 328), "white"))
        pairs[-1].paste(one, (0, 0))
        pairs[-1].paste(other, (0, 136))
    strip([pairs]).save(file := BytesIO(), "PNG")
    return {"figures/pairs.png": file.getvalue(), "sounds/pairs.wav": wav(sound(spectrograms))}
