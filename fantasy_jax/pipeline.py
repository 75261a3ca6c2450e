"""Picture, speech and prompt to video: encoders, transformer, sampler and VAE put together.

Each network is built when its phase begins and dropped when it ends, so that the text encoder's memory is
free before the transformer needs it. On a mesh each runs on all of its devices. Source of the steps:
fantasy-talking, `infer.py` and `diffsynth/pipelines/wan_video.py`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from PIL import Image
from safetensors.numpy import save

from fantasy_jax.config import ConfigError
from fantasy_jax.convert.files import WeightsError, open_weights
from fantasy_jax.data.face_crop import crop_face, find_face, points_in_box
from fantasy_jax.data.landmarks import LandmarkConfig
from fantasy_jax.data.preprocessing import clip_pixels, fit_picture, to_pixels
from fantasy_jax.data.speech import SAMPLE_RATE, SpeechEncoder, Wav2Vec2Features
from fantasy_jax.data.text import Tokenizer, tokenize
from fantasy_jax.diffusion.sampler import SamplerConfig, SamplerInputs, sample
from fantasy_jax.media import whole_or_nothing
from fantasy_jax.models.adapters.audio import AudioAdapter, AudioAdapterConfig
from fantasy_jax.models.adapters.identity import IdentityAdapter, IdentityAdapterConfig
from fantasy_jax.models.adapters.motion import NEUTRAL, MotionAdapter, MotionAdapterConfig
from fantasy_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from fantasy_jax.models.face_encoder import FaceEncoder, FaceEncoderConfig
from fantasy_jax.models.layers import run
from fantasy_jax.models.rows import sharing_rows
from fantasy_jax.models.tiling import PIXELS_PER_LATENT, decode, tiled_decode
from fantasy_jax.models.umt5 import UMT5Config, UMT5Encoder
from fantasy_jax.models.vae import VAEConfig, WanVAE
from fantasy_jax.models.wan import WanConfig, WanTransformer
from fantasy_jax.models.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model
from fantasy_jax.sharding import MeshConfig, constrain, in_host_memory, make_mesh, share, whole
from fantasy_jax.typing import Array, DType, Float, UInt8


@dataclass(frozen=True)
class ModelConfig:
    """All networks of a system.

    Attributes:
        transformer: The diffusion transformer.
        audio_adapter: What makes it hear.
        motion_adapter: What tells it how much to move; None: nothing does, as in the released weights.
        identity_adapter: What tells it who is in the picture; None: nothing does, as in the released weights.
        face_encoder: Face to features for the identity adapter, which needs it. Always float32.
        vae: Pixels to latents and back.
        text_encoder: Prompt to tokens.
        image_encoder: Picture to tokens.
        speech_encoder: Sound to features.
        dtype: Type of matrix products, and of the weights of networks that are not trained.
    """

    transformer: WanConfig = WanConfig()
    audio_adapter: AudioAdapterConfig = AudioAdapterConfig()
    motion_adapter: MotionAdapterConfig | None = None
    identity_adapter: IdentityAdapterConfig | None = None
    face_encoder: FaceEncoderConfig | None = None
    vae: VAEConfig = VAEConfig()
    text_encoder: UMT5Config = UMT5Config()
    image_encoder: CLIPVisionConfig = CLIPVisionConfig()
    speech_encoder: Wav2Vec2Config = Wav2Vec2Config()
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self):
        transformer, adapter, vae = self.transformer, self.audio_adapter, self.vae
        for name, value, wanted in (
            ("audio_adapter.width", adapter.width, transformer.dim),
            ("audio_adapter.num_heads", adapter.num_heads, transformer.num_heads),
            ("audio_adapter.num_layers", adapter.num_layers, transformer.num_layers),
            ("transformer.text_dim", transformer.text_dim, self.text_encoder.dim),
            ("transformer.image_dim", transformer.image_dim, self.image_encoder.dim),
            ("transformer.latent_channels", transformer.latent_channels, vae.latent_channels),
            ("transformer.condition_channels", transformer.condition_channels, vae.latent_channels + 4),
            ("audio_adapter.feature_width", adapter.feature_width, self.speech_encoder.hidden_size),
        ):
            if value != wanted:
                raise ConfigError(f"{name} is {value}, but what it is joined to has {wanted}")
        if self.motion_adapter and self.motion_adapter.width != transformer.dim:
            width = self.motion_adapter.width
            raise ConfigError(f"motion_adapter.width is {width}, but the transformer has {transformer.dim}")
        if self.identity_adapter:
            self._check_identity(self.identity_adapter)

    def _check_identity(self, adapter: IdentityAdapterConfig) -> None:
        if self.face_encoder is None:
            raise ConfigError(
                "identity_adapter is set, but no face_encoder, whose features it takes; set both"
            )
        for name, wanted in (
            ("width", self.transformer.dim),
            ("num_heads", self.transformer.num_heads),
            ("num_layers", self.transformer.num_layers),
            ("feature_width", self.face_encoder.widths[-1]),
            ("feature_size", self.face_encoder.feature_size),
        ):
            if (value := getattr(adapter, name)) != wanted:
                raise ConfigError(
                    f"identity_adapter.{name} is {value}, but what it is joined to has {wanted}"
                )


@dataclass(frozen=True)
class SampleConfig(SamplerConfig):
    """How a clip is made; the defaults are the official script's.

    Attributes:
        longest_edge: The picture is made this large, in pixels; both sides then grow to multiples of 16.
        fps: Frames a second.
        max_frames: Longest clip, 4k + 1; speech beyond it is cut.
        negative_prompt: What the picture should not be.
        face_motion: How much the face moves, in [0, 1] of the training clips; needs a motion adapter. The
            paper's subtle, natural and intense clips have 0.1, 0.5 and 1 for face and body.
        body_motion: How much the body moves, likewise.
        landmarks: How the picture's face is found, for a model with an identity adapter.
        face_box: Where the face is instead: left, top, right, bottom of the head as shares of the picture,
            for drawings in which no detector sees one. None: it is looked for.
        face: Which of several faces is meant, from 1, counted from the left; None takes the largest.
        mesh: How devices share each network; `tensor` shares weights, too. In the VAE `context` and
            `tensor` together share a picture's rows.
        merge_lora: Whether a LoRA of the store is added to the weights that are sampled from. Beside them it
            costs a percent more operations (at rank 32), and nothing is rounded.
        tile: Rows and columns of latents that are decoded at once, where one device decodes.
        tile_stride: From one tile to the next; what overlaps is blended.
    """

    longest_edge: int = 512
    fps: int = 23
    max_frames: int = 81
    negative_prompt: str = ""
    face_motion: float = NEUTRAL
    body_motion: float = NEUTRAL
    landmarks: LandmarkConfig = LandmarkConfig()
    face_box: tuple[float, float, float, float] | None = None
    face: int | None = None
    mesh: MeshConfig = MeshConfig(fsdp=1)
    merge_lora: bool = True
    tile: tuple[int, int] = (30, 52)
    tile_stride: tuple[int, int] = (15, 26)

    def __post_init__(self):
        super().__post_init__()
        if self.longest_edge < 16:
            raise ConfigError(f"longest_edge is {self.longest_edge}; at least 16 pixels are needed")
        if self.fps < 1:
            raise ConfigError(f"fps is {self.fps}; at least 1 is needed")
        if self.face is not None and self.face < 1:
            raise ConfigError(f"face is {self.face}; faces are counted from 1")
        for name in ("face_motion", "body_motion"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        if self.max_frames < 5 or self.max_frames % 4 != 1:
            raise ConfigError(f"max_frames is {self.max_frames}; it must be 4k + 1 and at least 5")
        if not all(0 < stride <= tile for tile, stride in zip(self.tile, self.tile_stride, strict=True)):
            raise ConfigError(f"tile_stride {self.tile_stride} must be positive and at most tile {self.tile}")


@runtime_checkable
class Networks(Protocol):
    """Where a pipeline gets its networks from: random, converted, or trained weights."""

    config: ModelConfig

    def text_encoder(self) -> tuple[UMT5Encoder, Tokenizer]:
        """The text encoder and the tokenizer it was trained with."""
        ...

    def image_encoder(self) -> CLIPVisionModel:
        """The picture encoder."""
        ...

    def speech_encoder(self) -> SpeechEncoder:
        """The maker of speech features."""
        ...

    def face_encoder(self) -> FaceEncoder:
        """The face encoder."""
        ...

    def vae(self) -> WanVAE:
        """The VAE."""
        ...

    def transformer(self) -> WanTransformer:
        """The transformer with its adapters."""
        ...


class RandomNetworks:
    """Networks with random weights: the whole path runs, and what it makes is noise."""

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        *,
        speech_encoder: SpeechEncoder | None = None,
        seed: int = 0,
    ):
        """Keeps what is needed to build each network when it is asked for.

        Args:
            config: All sizes.
            tokenizer: Of the text encoder.
            speech_encoder: One with weights, in place of the config's.
            seed: Of the weights.

        Raises:
            ConfigError: The tokenizer has more tokens than the text encoder, or the audio adapter is of
                another width than the speech encoder's features.
        """
        self.config = config
        self.tokenizer = tokenizer
        self.seed = seed
        self._speech_encoder = speech_encoder
        if len(tokenizer) > config.text_encoder.vocab_size:
            raise ConfigError(
                f"model.text_encoder.vocab_size is {config.text_encoder.vocab_size}, but the tokenizer has "
                f"{len(tokenizer)} tokens; set it with --config.model.text_encoder.vocab_size"
            )
        width = config.audio_adapter.feature_width
        if speech_encoder is not None and speech_encoder.width != width:
            raise ConfigError(
                f"model.audio_adapter.feature_width is {width}, but the speech encoder's features have "
                f"width {speech_encoder.width}; set it with --config.model.audio_adapter.feature_width"
            )

    def _build(
        self,
        network: Callable[..., nnx.Module],
        config: object,
        dtype: DType | None = None,
        **more: object,
    ) -> nnx.Module:
        dtype = jnp.dtype(dtype or self.config.dtype)

        @nnx.jit  # one compiled program draws all weights; one by one they take ten times as long
        def build(more: dict[str, object]) -> nnx.Module:
            # The usual generator would take most of that time to compile, once for each parameter.
            rngs = nnx.Rngs(jax.random.key(self.seed, impl="rbg"))
            return network(config, rngs=rngs, dtype=dtype, param_dtype=dtype, **more)

        return build(more)

    def text_encoder(self) -> tuple[UMT5Encoder, Tokenizer]:
        """A random encoder and the given tokenizer."""
        return self._build(UMT5Encoder, self.config.text_encoder), self.tokenizer

    def image_encoder(self) -> CLIPVisionModel:
        """A random tower."""
        return self._build(CLIPVisionModel, self.config.image_encoder)

    def speech_encoder(self) -> SpeechEncoder:
        """The one that was given; or a random wav2vec2."""
        if self._speech_encoder is not None:
            return self._speech_encoder
        return Wav2Vec2Features(self._build(Wav2Vec2Model, self.config.speech_encoder))

    def face_encoder(self) -> FaceEncoder:
        """A random face encoder."""
        return self._build(FaceEncoder, self.config.face_encoder, jnp.float32)

    def vae(self) -> WanVAE:
        """A random VAE."""
        return self._build(WanVAE, self.config.vae)

    def transformer(self) -> WanTransformer:
        """A random transformer with adapters that start from zero."""
        adapters = {"audio": self._build(AudioAdapter, self.config.audio_adapter)}
        if self.config.motion_adapter:
            adapters["motion"] = self._build(MotionAdapter, self.config.motion_adapter)
        if self.config.identity_adapter:
            adapters["identity"] = self._build(IdentityAdapter, self.config.identity_adapter)
        return self._build(WanTransformer, self.config.transformer, adapters=adapters)


class SharedNetworks:
    """Networks whose parameters are cut for a mesh: no device need hold what all of them share."""

    def __init__(self, networks: Networks, config: MeshConfig, mesh: Mesh):
        """Keeps where they come from, and what they are cut for: the mesh, made from its settings."""
        self.config = networks.config
        self._networks, self._mesh = networks, mesh
        self._context_parallelism = config.context_parallelism

    def text_encoder(self) -> tuple[UMT5Encoder, Tokenizer]:
        """The text encoder and its tokenizer."""
        with in_host_memory():
            encoder, tokenizer = self._networks.text_encoder()
        return share(encoder, self._mesh), tokenizer

    def image_encoder(self) -> CLIPVisionModel:
        """The picture encoder."""
        with in_host_memory():
            return share(self._networks.image_encoder(), self._mesh)

    def speech_encoder(self) -> SpeechEncoder:
        """The maker of speech features."""
        with in_host_memory():
            encoder = self._networks.speech_encoder()
        return replace(encoder, model=share(encoder.model, self._mesh))

    def face_encoder(self) -> FaceEncoder:
        """The face encoder."""
        with in_host_memory():
            return share(self._networks.face_encoder(), self._mesh)

    def vae(self) -> WanVAE:
        """The VAE."""
        with in_host_memory():
            return share(self._networks.vae(), self._mesh)

    def transformer(self) -> WanTransformer:
        """The transformer with its adapters."""
        with in_host_memory():
            transformer = self._networks.transformer()
        transformer.context_parallelism = self._context_parallelism
        return share(transformer, self._mesh)


@contextmanager
def on_mesh(networks: Networks, config: MeshConfig) -> Iterator[Networks]:
    """Puts a mesh in force, and gives the networks cut for it; on one device, the networks as they are."""
    mesh = make_mesh(**config.axes)
    if mesh.size == 1:
        yield networks
        return
    with jax.set_mesh(mesh):
        yield SharedNetworks(networks, config, mesh)


Phase = Callable[[str], AbstractContextManager]
"""Wraps each phase of the work, by its name, to time and report it."""


def clip_frames(seconds: float, config: SampleConfig) -> int:
    """Video frames for speech of this length: `min(floor(fps * seconds / 4) * 4 + 5, max_frames)`."""
    return min(int(config.fps * seconds // 4) * 4 + 5, config.max_frames)


def latent_shape(
    picture: Image.Image, sound: Float[np.ndarray, " samples"], config: SampleConfig, channels: int
) -> tuple[int, int, int, int, int]:
    """Shape `[B, F, h, w, C]` of the latents that a picture and its speech ask for."""
    width, height = (side // PIXELS_PER_LATENT for side in fit_picture(picture, config.longest_edge).size)
    return (1, clip_frames(sound.size / SAMPLE_RATE, config) // 4 + 1, height, width, channels)


def motion_input(model: ModelConfig, config: SampleConfig) -> Float[Array, "1 2"] | None:
    """Intensities of face and body for the sampler; None for a model without a motion adapter.

    Raises:
        ConfigError: Such a model is asked for more or less motion than usual.
    """
    wanted = (config.face_motion, config.body_motion)
    if model.motion_adapter:
        return jnp.array([wanted], jnp.float32)
    if wanted != (NEUTRAL, NEUTRAL):
        raise ConfigError(
            f"sample.face_motion and sample.body_motion are {wanted[0]} and {wanted[1]}, but the model has "
            f"no motion_adapter; leave them at {NEUTRAL}, or take a model that has one"
        )
    return None


def starting_noise(seed: int, shape: tuple[int, ...]) -> Float[Array, "B F h w C"]:
    """Normal noise, float32; the same seed gives PyTorch other numbers, which `read_noise` can bring."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def read_noise(path: str | Path, shape: tuple[int, ...]) -> Float[Array, "B F h w C"]:
    """Starting noise from a safetensors file of one tensor, `noise`, as `torch.randn` makes it for Wan2.1.

    Args:
        path: The file; the tensor is `[B, C, F, h, w]`.
        shape: The latents' shape here, `[B, F, h, w, C]`.

    Raises:
        WeightsError: The file is missing or damaged, or does not hold such a tensor.
    """
    if Path(path).suffix != ".safetensors":
        raise WeightsError(f"{path}: noise is read from a .safetensors file of one tensor named noise")
    file = open_weights(path)
    if set(file.specs) != {"noise"}:
        raise WeightsError(
            f"{path}: holds {', '.join(sorted(file.specs)) or 'nothing'}; give one tensor, noise"
        )
    found, wanted = file.specs["noise"], (shape[0], shape[-1], *shape[1:-1])
    if found.shape != wanted or found.dtype.kind in "iub":
        asked = " x ".join(map(str, wanted))
        raise WeightsError(
            f"{path}: noise is {found.dtype} of {' x '.join(map(str, found.shape))}; "
            f"this picture, speech and config ask for float32 of {asked}"
        )
    noise = np.asarray(file.read("noise"), np.float32)
    if not np.isfinite(noise).all():
        raise WeightsError(f"{path}: noise holds values that are no numbers; make it anew")
    return jnp.asarray(np.moveaxis(noise, 1, -1))


def save_latents(path: str | Path, latents: Float[Array, "B F h w C"]) -> None:
    """Writes a safetensors file of one tensor, `latents`, laid out as PyTorch has it: `[B, C, F, h, w]`.

    Raises:
        MediaError: The file cannot be written; nothing is left of it then.
    """
    channels_first = np.ascontiguousarray(np.moveaxis(np.asarray(latents, np.float32), -1, 1))
    with whole_or_nothing(path) as partial:
        partial.write_bytes(save({"latents": channels_first}))


def generate_latents(
    networks: Networks,
    config: SampleConfig,
    *,
    picture: Image.Image,
    sound: Float[np.ndarray, " samples"],
    prompt: str,
    noise: Float[Array, "1 F h w C"],
    face_points: Float[np.ndarray, "5 2"] | None = None,
    phase: Phase = lambda name: nullcontext(),
    progress: bool = False,
) -> Float[Array, "1 F h w C"]:
    """Makes a picture talk, up to the latents of the video.

    Args:
        networks: Where the networks come from; each is let go before the next is asked for.
        config: Size, length, sampler.
        picture: The portrait, RGB.
        sound: The speech, 16 kHz, mono; what lies beyond the clip is not heard.
        prompt: What happens.
        noise: Where sampling starts, of the shape that `latent_shape` gives.
        face_points: Of the picture's face, for a model with an identity adapter; None finds them.
        phase: Called with the name of each phase; the work runs inside what it returns.
        progress: Show a bar.

    Returns:
        Latents, float32, normalised as the VAE gives them.

    Raises:
        ConfigError: A motion is asked for that the model cannot make, or what finds its face is missing.
        MediaError: The picture shows no whole face to a model that needs one.
    """
    num_frames = clip_frames(sound.size / SAMPLE_RATE, config)
    motion, face = motion_input(networks.config, config), None
    with on_mesh(networks, config.mesh) as networks:
        if networks.config.identity_adapter:
            with phase("Face encoder"):  # first, for it is quick to tell that there is no face
                face = encode_face(networks, config, picture, face_points)
        with phase("Text encoder"):
            text, negative = encode_text(networks, [prompt, config.negative_prompt])
        with phase("Picture encoder"):
            pixels = jnp.asarray(to_pixels(fit_picture(picture, config.longest_edge)))
            image = encode_picture(networks, pixels)
        with phase("Speech encoder"):
            audio = networks.speech_encoder()(sound[: int(num_frames / config.fps * SAMPLE_RATE)])
        with phase("First frame through the VAE"):
            latents = encode_first_frame(networks.vae(), pixels[None], num_frames)
            first_frame = first_frame_condition(latents).block_until_ready()
        with phase("Transformer"):
            inputs = SamplerInputs(first_frame, text, negative, image, audio, motion, face)
            return sample(networks.transformer(), *whole((noise, inputs)), config, progress=progress)


def decode_latents(
    networks: Networks, latents: Float[Array, "1 F h w C"], config: SampleConfig, *, progress: bool = False
) -> UInt8[np.ndarray, "T H W 3"]:
    """Latents to the frames of the video: by devices that share the rows, or by one, tile by tile."""
    with on_mesh(networks, config.mesh) as networks:
        vae = networks.vae()
        if sharing_rows() > 1:
            video = decode(vae, whole(latents))
        else:
            video = tiled_decode(vae, latents, tile=config.tile, stride=config.tile_stride, progress=progress)
    return to_uint8(np.asarray(video[0], np.float32))


def from_uint8(video: UInt8[Array | np.ndarray, "*n H W 3"]) -> Float[Array, "*n H W 3"]:
    """Bytes to pixels in [-1, 1]."""
    return jnp.asarray(video, jnp.float32) / 127.5 - 1


def to_uint8(video: Float[np.ndarray, "*n H W 3"]) -> UInt8[np.ndarray, "*n H W 3"]:
    """Pixels in [-1, 1] to bytes, cut off as the official code does, not rounded."""
    return ((video + 1) * 127.5).clip(0, 255).astype(np.uint8)


def encode_text(networks: Networks, prompts: list[str]) -> list[Float[Array, "1 L C"]]:
    """Each prompt through the text encoder, without padding."""
    encoder, tokenizer = networks.text_encoder()
    ids, lengths = tokenize(prompts, tokenizer, max_length=networks.config.transformer.text_length)
    encoded = run(encoder, jnp.asarray(ids), jnp.asarray(lengths))
    return [encoded[i : i + 1, :length].astype(jnp.float32) for i, length in enumerate(lengths)]


def encode_picture(networks: Networks, pixels: Float[Array, "H W 3"]) -> Float[Array, "1 L C"]:
    """The portrait through the picture encoder."""
    encoder = networks.image_encoder()
    small = clip_pixels(pixels[None], encoder.config.image_size)
    return run(encoder, small).astype(jnp.float32)


def encode_face(
    networks: Networks,
    config: SampleConfig,
    picture: Image.Image,
    points: Float[np.ndarray, "5 2"] | None = None,
) -> Float[Array, "1 P C"]:
    """The portrait's face through the face encoder; arguments and errors as of `generate_latents`."""
    if points is None and config.face_box:
        points = points_in_box(np.array(config.face_box) * np.tile(picture.size, 2))
    elif points is None:
        points = find_face(picture, config.landmarks, number=config.face)
    crop = crop_face(picture, points, networks.config.face_encoder.image_size)
    return encode_faces(networks.face_encoder(), crop[None])[1]


def encode_faces(
    encoder: FaceEncoder, crops: UInt8[np.ndarray, "B H W 3"]
) -> tuple[Float[Array, "B E"], Float[Array, "B P C"]]:
    """Crops from `data.face_crop` through the face encoder.

    Returns:
        Embeddings of length one, so that the product of two is the cosine that tells whether they are one
        person's; and the features of places, which the identity adapter takes.
    """
    embedding, features = run(encoder, from_uint8(crops))
    return embedding / jnp.linalg.norm(embedding, axis=-1, keepdims=True), features


def first_frame_latents(
    vae: WanVAE, pixels: Float[Array, "B H W 3"], num_frames: int
) -> Float[Array, "B F h w C"]:
    """Latents of pictures followed by mid-grey frames (which are not zero latents).

    However devices shared the rows, each has its clips' latents whole, as the transformer wants them.
    """
    batch, *picture = pixels.shape
    grey = jnp.zeros((batch, num_frames - 1, *picture), pixels.dtype)
    video = jnp.concatenate([pixels[:, None], grey], axis=1)
    return constrain(vae.encode(video).astype(jnp.float32), "batch", None, None, None, None)


encode_first_frame = jax.jit(first_frame_latents, static_argnums=2)
"""`first_frame_latents` as one compiled program."""


def first_frame_condition(latents: Float[Array, "B F h w C"]) -> Float[Array, "B F h w E"]:
    """What tells the transformer how the clip begins: `first_frame_latents` behind four channels of mask.

    The mask is one in the first latent frame and zero after it.
    """
    mask = jnp.zeros((*latents.shape[:-1], 4), latents.dtype).at[:, 0].set(1)
    return jnp.concatenate([mask, latents], axis=-1)
