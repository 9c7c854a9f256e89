"""EnCodec's decoder at 24 kHz: residual vector quantiser and SEANet decoder, weight norm already folded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bark_fast.config import CodecConfig


class CausalConv(nn.Conv1d):
    """Convolution whose padding lies wholly on the left, by reflection (EnCodec's causal SConv1d, stride 1)."""

    def forward(self, x: Tensor) -> Tensor:
        left = (self.kernel_size[0] - 1) * self.dilation[0]
        # reflection needs more samples than it mirrors; EnCodec lends zeros and takes them back
        lent = max(0, left - x.shape[-1] + 1)
        if lent:
            x = F.pad(x, (0, lent))
        if left:
            x = F.pad(x, (left, 0), mode="reflect")
        y: Tensor = super().forward(x[..., : x.shape[-1] - lent])
        return y


class Residual(nn.Module):
    """shortcut(x) + conv_2(elu(conv_1(elu(x)))). x: (batch, channels, time)."""

    def __init__(self, config: CodecConfig, channels: int, dilation: int) -> None:
        super().__init__()
        hidden = channels // config.compress
        self.conv_1 = CausalConv(channels, hidden, config.residual_kernel_size, dilation=dilation)
        self.conv_2 = CausalConv(hidden, channels, 1)
        self.shortcut = CausalConv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv_2(F.elu_(self.conv_1(F.elu(x))))
        y += self.shortcut(x)
        return y


class Upsample(nn.Module):
    """ELU, transposed convolution by `ratio` trimmed on the right, residual blocks."""

    def __init__(self, config: CodecConfig, channels: int, ratio: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(channels, channels // 2, 2 * ratio, stride=ratio)
        self.ratio = ratio
        self.residuals = nn.ModuleList(
            Residual(config, channels // 2, config.dilation_growth_rate**j)
            for j in range(config.num_residual_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(F.elu(x))[..., : -self.ratio]
        for residual in self.residuals:
            x = residual(x)
        return x


class Codec(nn.Module):
    """Codes to waveform (Défossez et al. 2022, arXiv:2210.13438; encodec `modules/seanet.py`). fp32."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.num_filters * 2 ** len(config.upsampling_ratios)
        self.codebooks = nn.Parameter(
            torch.empty(config.num_codebooks, config.codebook_size, config.hidden_size)
        )
        self.conv_in = CausalConv(config.hidden_size, channels, config.kernel_size)
        self.lstm = nn.LSTM(channels, channels, config.num_lstm_layers)
        self.blocks = nn.ModuleList(
            Upsample(config, channels >> i, ratio) for i, ratio in enumerate(config.upsampling_ratios)
        )
        self.conv_out = CausalConv(config.num_filters, 1, config.last_kernel_size)

    def forward(self, codes: Tensor) -> Tensor:
        """codes (batch, codebooks, time) int64, up to `num_codebooks` -> samples (batch, time * hop_length)."""
        x = torch.zeros((), device=codes.device)
        for codebook, indices in zip(self.codebooks, codes.unbind(1), strict=False):
            x = x + F.embedding(indices, codebook)
        x = self.conv_in(x.transpose(1, 2))
        steps = x.permute(2, 0, 1)
        x = (self.lstm(steps)[0] + steps).permute(1, 2, 0)
        for block in self.blocks:
            x = block(x)
        samples: Tensor = self.conv_out(F.elu(x))
        return samples[:, 0]
