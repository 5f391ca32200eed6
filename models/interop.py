"""Weights to and from diffusers' Wan classes. diffusers is imported on the first call.

The function is the same on both sides; names, and a few layouts, are ours: queries, keys and values
are one matrix, 1×1 kernels and patch convolutions are matrices.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longtake.models.dit import DiT, DiTConfig
from longtake.models.vae import VAE
from longtake.models.vae_config import VAEConfig

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<subfolder>[\w.-]+))?")
# Our name → theirs, tried in this order; what no rule matches keeps its name.
_VAE_RULES = (
    (r"^quant\.", "quant_conv."),
    (r"^post_quant\.", "post_quant_conv."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.qkv\.", ".mid_block.attentions.0.to_qkv."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"^decoder\.stages\.(\d+)\.blocks\.", r"decoder.up_blocks.\1.resnets."),
    (r"\.space\.", ".resample.1."),
    (r"\.time\.", ".time_conv."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"(\.norm\w*)\.weight$", r"\1.gamma"),
)
_RESIDUAL_VAE_RULES = (
    (r"^encoder\.stages\.(\d+)\.blocks\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.stages\.(\d+)\.down\.", r"encoder.down_blocks.\1.downsampler."),
    (r"^decoder\.stages\.(\d+)\.up\.", r"decoder.up_blocks.\1.upsampler."),
)
_PLAIN_VAE_RULES = ((r"^decoder\.stages\.(\d+)\.up\.", r"decoder.up_blocks.\1.upsamplers.0."),)
_DIT_RULES = (
    (r"^patch_embed\.", "patch_embedding."),
    (r"^time_embed\.fc(\d)\.", r"condition_embedder.time_embedder.linear_\1."),
    (r"^text_embed\.fc(\d)\.", r"condition_embedder.text_embedder.linear_\1."),
    (r"^time_proj\.", "condition_embedder.time_proj."),
    (r"^head\.", "proj_out."),
    (r"modulation$", "scale_shift_table"),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.norm_cross\.", ".norm2."),
    (r"\.proj\.", ".to_out.0."),
    (r"\.norm_(q|k)$", r".norm_\1.weight"),
    (r"\.mlp\.fc1\.", ".ffn.net.0.proj."),
    (r"\.mlp\.fc2\.", ".ffn.net.2."),
)


def vae_config_from_diffusers(config: dict) -> VAEConfig:
    """Our sizes of an `AutoencoderKLWan` config. ValueError for what this VAE does not do."""
    if config["attn_scales"]:
        raise ValueError(
            f"AutoencoderKLWan config has attn_scales={config['attn_scales']}: it must be empty, "
            "attention at those resolutions cannot run in the peer either"
        )
    patch = config["patch_size"] or 1
    channels = {}
    for key in ("in_channels", "out_channels"):
        channels[key], rest = divmod(config[key], patch**2)
        if rest:
            raise ValueError(
                f"AutoencoderKLWan config has {key}={config[key]}: it must be a multiple of "
                f"patch_size² = {patch**2}"
            )
    return VAEConfig(
        base_dim=config["base_dim"],
        decoder_base_dim=config["decoder_base_dim"],
        z_dim=config["z_dim"],
        dim_mult=tuple(config["dim_mult"]),
        temporal_downsample=tuple(config["temperal_downsample"]),
        num_res_blocks=config["num_res_blocks"],
        residual=config["is_residual"],
        patch_size=patch,
        **channels,
    )


def vae_from_diffusers(module: "AutoencoderKLWan") -> VAE:
    """A VAE with the weights of an `AutoencoderKLWan`."""
    vae = VAE(vae_config_from_diffusers(dict(module.config)))
    theirs, ours = module.state_dict(), vae.state_dict()
    names = _vae_names(vae.config, ours)
    _check_names(set(names.values()), set(theirs), "AutoencoderKLWan")
    vae.load_state_dict({name: theirs[names[name]].reshape(ours[name].shape) for name in ours})
    return vae


def vae_from_pretrained(place: str) -> VAE:
    """The VAE of a diffusers folder or hub id (see `_read_component`), on the CPU in fp32."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    return vae_from_diffusers(_read_component(AutoencoderKLWan, place, "vae"))


def vae_to_diffusers(
    vae: VAE, *, latents_mean: Sequence[float], latents_std: Sequence[float]
) -> "AutoencoderKLWan":
    """An `AutoencoderKLWan` with our weights and the per-channel statistics of the latents."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    config = vae.config
    with torch.random.fork_rng(devices=[]):  # building it draws weights that are then replaced
        module = AutoencoderKLWan(
            base_dim=config.base_dim,
            decoder_base_dim=config.decoder_base_dim,
            z_dim=config.z_dim,
            dim_mult=list(config.dim_mult),
            num_res_blocks=config.num_res_blocks,
            temperal_downsample=list(config.temporal_downsample),
            latents_mean=list(latents_mean),
            latents_std=list(latents_std),
            is_residual=config.residual,
            in_channels=config.in_channels * config.patch_size**2,
            out_channels=config.out_channels * config.patch_size**2,
            patch_size=None if config.patch_size == 1 else config.patch_size,
            scale_factor_temporal=config.strides[0],
            scale_factor_spatial=config.strides[1],
        )
    theirs, ours = module.state_dict(), vae.state_dict()
    names = _vae_names(config, ours)
    _check_names(set(names.values()), set(theirs), "AutoencoderKLWan")
    module.load_state_dict(
        {names[name]: tensor.reshape(theirs[names[name]].shape) for name, tensor in ours.items()}
    )
    return module.eval()


def dit_config_from_diffusers(config: dict) -> DiTConfig:
    """Our sizes of a `WanTransformer3DModel` config. ValueError for image cross-attention."""
    for key in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
        if config.get(key) is not None:
            raise ValueError(
                f"WanTransformer3DModel config has {key}={config[key]}: weights with image "
                "cross-attention are not supported; use a text-to-video or TI2V model"
            )
    if config["qk_norm"] != "rms_norm_across_heads":
        raise ValueError(f"WanTransformer3DModel config has qk_norm={config['qk_norm']}")
    return DiTConfig(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"] or config["in_channels"],
        hidden_size=config["num_attention_heads"] * config["attention_head_dim"],
        num_heads=config["num_attention_heads"],
        depth=config["num_layers"],
        ffn_dim=config["ffn_dim"],
        text_dim=config["text_dim"],
        patch_size=tuple(config["patch_size"]),
        freq_dim=config["freq_dim"],
        cross_attn_norm=config["cross_attn_norm"],
        eps=config["eps"],
    )


def dit_from_diffusers(module: "WanTransformer3DModel") -> DiT:
    """A DiT with the weights of a `WanTransformer3DModel`, in fp32."""
    with torch.device("meta"):  # 14 B weights are not drawn only to be replaced
        dit = DiT(dit_config_from_diffusers(dict(module.config)))
    dit.load_state_dict(dit_state_from_diffusers(module.state_dict(), dit), assign=True)
    return dit.float()


def dit_from_pretrained(place: str) -> DiT:
    """The DiT of a diffusers folder or hub id (see `_read_component`), on the CPU in fp32."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    return dit_from_diffusers(_read_component(WanTransformer3DModel, place, "transformer"))


def dit_state_from_diffusers(theirs: dict[str, Tensor], dit: DiT) -> dict[str, Tensor]:
    """Tensors under their names → under ours; for weights and gradients alike."""
    ours = dit.state_dict()
    names = {name: _dit_names(name) for name in ours}
    _check_names({n for parts in names.values() for n in parts}, set(theirs), "the Wan transformer")
    state = {}
    for name, parts in names.items():
        state[name] = torch.cat([theirs[part] for part in parts]).reshape(ours[name].shape)
    return state


def dit_to_diffusers(dit: DiT) -> "WanTransformer3DModel":
    """A `WanTransformer3DModel` with our weights. ValueError for absolute positions."""
    if positions := dit.config.absolute_positions:
        raise ValueError(f"model.absolute_positions={positions}: diffusers' Wan has none")
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    config = dit.config
    with torch.random.fork_rng(devices=[]):  # building it draws weights that are then replaced
        module = WanTransformer3DModel(
            patch_size=config.patch_size,
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.depth,
            cross_attn_norm=config.cross_attn_norm,
            eps=config.eps,
        )
    theirs = module.state_dict()
    state = {}
    for name, tensor in dit.state_dict().items():
        parts = _dit_names(name)
        for part, piece in zip(parts, tensor.chunk(len(parts)), strict=True):
            state[part] = piece.reshape(theirs[part].shape)
    module.load_state_dict(state)
    return module.eval()


def dit_layer_names(layer: str) -> list[str]:
    """Their names of a linear layer of our DiT, in the order in which ours holds its rows."""
    return [name.removesuffix(".weight") for name in _dit_names(f"{layer}.weight")]


def _read_component(kind: Any, place: str, name: str) -> Any:
    """A module of a diffusers folder or hub id, in fp32.

    The place is the module's own folder or a pipeline that holds it as `name`; a hub id may end in
    another subfolder, `owner/pipeline/transformer_2`. ValueError where nothing of the kind can be
    read, or where some of its weights are missing, unexpected or of another shape.
    """
    hub_id = HUB_ID.fullmatch(place)
    if Path(place).is_dir():
        source, subfolder = place, None if (Path(place) / "config.json").is_file() else name
    elif hub_id:
        source, subfolder = hub_id["repository"], hub_id["subfolder"] or name
    else:
        raise ValueError(f"{place}: no such folder, and no hub id (owner/name)")
    try:
        module, found = kind.from_pretrained(
            source,
            subfolder=subfolder,
            use_safetensors=True,  # alone: nothing is unpickled
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # or the first of them would be all that is said
        )
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{place}: no {kind.__name__} can be read there: {first}") from error
    reshaped = [
        f"{key} is {tuple(shape)}, the config makes it {tuple(wanted)}"
        for key, shape, wanted in found["mismatched_keys"]
    ]
    faults = [*_name_faults(found["missing_keys"], found["unexpected_keys"]), *reshaped]
    faults += found["error_msgs"]
    if faults:
        listed = "\n  ".join(faults)
        raise ValueError(f"{place}: weights do not fit their own config:\n  {listed}")
    return module


def _vae_names(config: VAEConfig, ours: Iterable[str]) -> dict[str, str]:
    """Our names → theirs. Without residuals their encoder numbers blocks and steps in one list."""

    def flat(match: re.Match[str]) -> str:
        stage, block = match.groups()
        last = config.num_res_blocks
        place = int(stage) * (last + 1) + (last if block is None else int(block))
        return f"encoder.down_blocks.{place}."

    names = {}
    for name in ours:
        theirs = name
        if not config.residual:
            theirs = re.sub(r"^encoder\.stages\.(\d+)\.(?:blocks\.(\d+)|down)\.", flat, theirs)
        rules = _RESIDUAL_VAE_RULES if config.residual else _PLAIN_VAE_RULES
        for pattern, replacement in (*rules, *_VAE_RULES):
            theirs = re.sub(pattern, replacement, theirs)
        names[name] = theirs
    return names


def _dit_names(name: str) -> list[str]:
    """Their names of our tensor: three for fused q, k, v, two for fused k, v, else one."""
    fused = re.search(r"\.(qkv|kv|q)\.", name)
    for pattern, replacement in _DIT_RULES:
        name = re.sub(pattern, replacement, name)
    if not fused:
        return [name]
    return [name.replace(f".{fused[1]}.", f".to_{part}.") for part in fused[1]]


def _check_names(expected: set[str], found: set[str], what: str) -> None:
    faults = _name_faults(expected - found, found - expected)
    if faults:
        listed = "\n  ".join(faults)
        raise ValueError(f"weights of {what} do not fit their config:\n  {listed}")


def _name_faults(missing: Iterable[str], unexpected: Iterable[str]) -> list[str]:
    faults = [f"{name} is missing" for name in sorted(missing)]
    return faults + [f"{name} is unexpected" for name in sorted(unexpected)]


def unipc_scheduler(shift: float) -> "UniPCMultistepScheduler":
    """The multistep solver of the stock Wan pipelines, for flows shifted by `shift`."""
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
