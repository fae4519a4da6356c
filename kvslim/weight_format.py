"""How a graph stores its large matrices: what recipes and manifests say of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from kvslim.contract import Frozen, WeightMethod, WeightType


class WeightFormat(Frozen):
    """How a graph stores its large matrices and its embedding table."""

    type: Literal[WeightType, "stored", "auto"] = Field(
        "fp32",
        description="of all matrices; int8 and int4 in blocks; stored: the blocks of a GGUF as they are; "
        "auto: stored for a GGUF in blocks, else int4 for decoders and fp32 for encoders",
    )
    method: WeightMethod = Field(
        "k_quant",
        description="rtn rounds; k_quant searches scales and zero points; gptq (decoders) uses calibration text",
    )
    block: Literal[32, 64, 128] | None = Field(
        None, description="numbers that share a scale, at most; default: 32 of 4 bits or of an encoder, 128 of 8"
    )
    mixed: bool = Field(False, description="with int4: the most sensitive matrices in int8")
    file_mib: float | None = Field(
        None, gt=0, description="with int4 (decoders): size of the file within which bits and blocks are picked"
    )
    file_ratio: float | None = Field(
        None, gt=1, description="the same, as how many times smaller than the export in float32"
    )

    @model_validator(mode="after")
    def _check_parts(self) -> WeightFormat:
        if self.file_mib is not None and self.file_ratio is not None:
            raise ValueError("give file_mib or file_ratio, not both")
        is_int4 = self.type in ("int4", "auto")
        if self.picks and (not is_int4 or self._is_said):
            raise ValueError(
                "a limit of the file picks bits and blocks: give type int4 and method gptq or k_quant alone"
            )
        if self.mixed and not is_int4:
            raise ValueError(f"mixed goes with type int4, not {self.type}")
        if self.type in ("fp32", "stored") and (self.method != "k_quant" or self.block is not None):
            said = f"method {self.method}" if self.block is None else f"block {self.block}"
            raise ValueError(f"{said} goes with type int8 or int4, not {self.type}")
        return self

    @property
    def is_quantised(self) -> bool:
        """Whether matrices are stored in blocks."""
        return self.type in ("int8", "int4", "stored")

    def settled(self, *, is_encoder: bool, has_blocks: bool) -> WeightFormat:
        """The format with `auto` decided; where more is asked of it, that is int4."""
        if self.type != "auto":
            return self
        if is_encoder:
            return WeightFormat()
        keeps = has_blocks and self == WeightFormat(type="auto")
        return self.model_copy(update={"type": "stored" if keeps else "int4"})

    @property
    def needs_text(self) -> bool:
        """Whether calibration text decides how matrices are stored."""
        return self.method == "gptq" or self.picks

    @property
    def is_open(self) -> bool:
        """Whether bits and blocks of each matrix can still be picked."""
        return self.type in ("int4", "auto") and not self.picks and not self._is_said

    @property
    def _is_said(self) -> bool:
        """Whether the recipe says bits or blocks of matrices itself, beyond a type."""
        return self.mixed or self.block is not None or self.method == "rtn"

    @property
    def picks(self) -> bool:
        """Whether bits and blocks of each matrix are picked within a limit of the file."""
        return self.file_mib is not None or self.file_ratio is not None

    @property
    def like(self) -> WeightType:
        """The format that costs about as much time."""
        return self.type if self.type in ("fp32", "int8") else "int4"

    def __str__(self) -> str:
        rounded = self.type in ("int8", "int4") or self.picks
        words = [self.method, *["mixed"] * self.mixed, *[f"blocks of {self.block}"] * (self.block is not None)]
        words += [] if self.file_mib is None else [f"4 to 8 bits within {self.file_mib:g} MiB"]
        words += [] if self.file_ratio is None else [f"4 to 8 bits, {self.file_ratio:g} times smaller"]
        return f"{self.type} ({', '.join(words)})" if rounded else self.type


def _weight_format(value: object) -> object:
    """A plain word is a format's type."""
    return {"type": value} if isinstance(value, str) else value


Weights = Annotated[WeightFormat, BeforeValidator(_weight_format)]
