"""Parameter names and shapes: ours, suno's, Hugging Face's and EnCodec's.

Ours, for the semantic and the coarse model: `wte.weight`, `wpe.weight`,
`layers.{i}.{ln_1,qkv,out,ln_2,fc,proj}.weight` (and `.bias` where the model has biases), `ln_f.weight`,
`head.weight`. The fine model has `wtes.{k}.weight` and `heads.{k}.weight` in place of `wte` and `head`.
Linear weights are (out, in), as in `torch.nn.Linear`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bark_fast.config import CodecConfig, FineConfig, GPTConfig, ModelName

Shape = tuple[int, ...]

_SUNO_TOP = {"wte": "transformer.wte", "wpe": "transformer.wpe", "ln_f": "transformer.ln_f", "head": "lm_head",
             "wtes": "transformer.wtes", "heads": "lm_heads", "layers": "transformer.h"}  # fmt: skip
_SUNO_LAYER = {"ln_1": "ln_1", "qkv": "attn.c_attn", "out": "attn.c_proj",
               "ln_2": "ln_2", "fc": "mlp.c_fc", "proj": "mlp.c_proj"}  # fmt: skip
_HF_TOP = {"wte": "input_embeds_layer", "wpe": "position_embeds_layer", "ln_f": "layernorm_final",
           "head": "lm_head", "wtes": "input_embeds_layers", "heads": "lm_heads",
           "layers": "layers"}  # fmt: skip
_HF_LAYER = {"ln_1": "layernorm_1", "qkv": "attn.att_proj", "out": "attn.out_proj",
             "ln_2": "layernorm_2", "fc": "mlp.in_proj", "proj": "mlp.out_proj"}  # fmt: skip
HF_PREFIX: dict[ModelName, str] = {
    "semantic": "semantic.",
    "coarse": "coarse_acoustics.",
    "fine": "fine_acoustics.",
    "codec": "codec_model.",
}


def gpt_shapes(config: GPTConfig) -> dict[str, Shape]:
    """Our parameter names of one transformer, with shapes. Fine heads may be tied: see `tied`."""
    width, fine = config.n_embd, isinstance(config, FineConfig)
    shapes: dict[str, Shape] = {}
    if isinstance(config, FineConfig):
        for k in range(config.n_codes_total):
            shapes[f"wtes.{k}.weight"] = (config.input_vocab_size, width)
    else:
        shapes["wte.weight"] = (config.input_vocab_size, width)
    shapes["wpe.weight"] = (config.block_size, width)
    linears = {
        "qkv": (3 * width, width),
        "out": (width, width),
        "fc": (4 * width, width),
        "proj": (width, 4 * width),
    }
    norm_bias = config.bias or fine  # the fine model's LayerNorms are torch's own, which always have a bias
    for i in range(config.n_layer):
        for part in ("ln_1", "qkv", "out", "ln_2", "fc", "proj"):
            shapes[f"layers.{i}.{part}.weight"] = linears.get(part, (width,))
            if config.bias if part in linears else norm_bias:
                shapes[f"layers.{i}.{part}.bias"] = linears.get(part, (width,))[:1]
    shapes["ln_f.weight"] = (width,)
    if norm_bias:
        shapes["ln_f.bias"] = (width,)
    if isinstance(config, FineConfig):
        for k in range(config.n_codes_total - config.n_codes_given):
            shapes[f"heads.{k}.weight"] = (config.output_vocab_size, width)
    else:
        shapes["head.weight"] = (config.output_vocab_size, width)
    return shapes


def tied(name: str) -> str | None:
    """The embedding a fine head shares its weight with: heads.k is wtes.k+1 (suno `model_fine.py`)."""
    if not name.startswith("heads."):
        return None
    return f"wtes.{int(name.split('.')[1]) + 1}.weight"


def _translate(name: str, top: dict[str, str], layer: dict[str, str]) -> str:
    head, *rest = name.split(".")
    if head == "layers":
        rest[1] = layer[rest[1]]
    return ".".join([top[head], *rest])


def suno_name(name: str) -> str:
    """Our transformer parameter name in suno's files."""
    return _translate(name, _SUNO_TOP, _SUNO_LAYER)


def hf_name(model: ModelName, name: str) -> str:
    """Our transformer parameter name in a Hugging Face `BarkModel` state dict."""
    return HF_PREFIX[model] + _translate(name, _HF_TOP, _HF_LAYER)


@dataclass(frozen=True)
class Conv:
    """One convolution of EnCodec's SEANet.

    ours: our parameter prefix; path: its place in the decoder, such as `4.block.1`, the same in both formats;
    shape: of the weight, (out, in, kernel), or (in, out, kernel) when transposed; bias: its length.
    """

    ours: str
    path: str
    shape: Shape
    bias: int
    transposed: bool = False

    def suno_name(self, part: str = "decoder") -> str:
        kind = "convtr.convtr" if self.transposed else "conv.conv"
        return f"{part}.model.{self.path}.{kind}"

    def hf_name(self, part: str = "decoder") -> str:
        return f"codec_model.{part}.layers.{self.path}.conv"


def _residual(ours: str, index: int, width: int, config: CodecConfig) -> Iterator[Conv]:
    hidden = width // config.compress
    yield Conv(f"{ours}.conv_1", f"{index}.block.1", (hidden, width, config.residual_kernel_size), hidden)
    yield Conv(f"{ours}.conv_2", f"{index}.block.3", (width, hidden, 1), width)
    yield Conv(f"{ours}.shortcut", f"{index}.shortcut", (width, width, 1), width)


def seanet_width(config: CodecConfig) -> int:
    """Channels at the frame rate, where the LSTM is (512)."""
    return config.num_filters << len(config.upsampling_ratios)


def decoder_convs(config: CodecConfig) -> Iterator[Conv]:
    """Convolutions of EnCodec's decoder, in order (encodec `modules/seanet.py`, SEANetDecoder)."""
    width = seanet_width(config)
    yield Conv("conv_in", "0", (width, config.hidden_size, config.kernel_size), width)
    index = 2  # 0 is conv_in, 1 the LSTM; activations take a place of their own
    for i, ratio in enumerate(config.upsampling_ratios):
        yield Conv(
            f"blocks.{i}.up", f"{index + 1}", (width, width // 2, 2 * ratio), width // 2, transposed=True
        )
        width //= 2
        for j in range(config.num_residual_layers):
            yield from _residual(f"blocks.{i}.residuals.{j}", index + 2 + j, width, config)
        index += 2 + config.num_residual_layers
    yield Conv("conv_out", f"{index + 1}", (1, width, config.last_kernel_size), 1)


def encoder_convs(config: CodecConfig) -> Iterator[Conv]:
    """Convolutions of EnCodec's encoder, in order (SEANetEncoder). Written, never read: `ours` is a label."""
    width = config.num_filters
    yield Conv("encoder.conv_in", "0", (width, 1, config.kernel_size), width)
    index = 1
    for i, ratio in enumerate(reversed(config.upsampling_ratios)):
        for j in range(config.num_residual_layers):
            yield from _residual(f"encoder.blocks.{i}.residuals.{j}", index + j, width, config)
        index += config.num_residual_layers + 1
        yield Conv(f"encoder.blocks.{i}.down", f"{index}", (2 * width, width, 2 * ratio), 2 * width)
        width *= 2
        index += 1
    # index is the LSTM, then an activation
    yield Conv("encoder.conv_out", f"{index + 2}", (config.hidden_size, width, config.last_kernel_size),
               config.hidden_size)  # fmt: skip


def lstm_shapes(config: CodecConfig) -> dict[str, Shape]:
    """`torch.nn.LSTM` names and shapes of the codec's LSTM."""
    width = seanet_width(config)
    shapes: dict[str, Shape] = {}
    for layer in range(config.num_lstm_layers):
        for gate in ("ih", "hh"):
            shapes[f"weight_{gate}_l{layer}"] = (4 * width, width)
            shapes[f"bias_{gate}_l{layer}"] = (4 * width,)
    return shapes
