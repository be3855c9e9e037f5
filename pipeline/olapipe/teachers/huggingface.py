"""Teachers that are PyTorch modules of transformers: strict loading, and the forward pass around the model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from olapipe.teachers.base import Preprocessor, Teacher, TeacherSettings
from olapipe.teachers.checkpoint import Checkpoint
from olaschema.errors import TeacherError
from olaschema.manifest import Fingerprint

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    Model = TypeVar("Model", bound=PreTrainedModel)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TorchTeacher(Teacher):
    """A teacher whose features are the output of one module: `(B, 3, H, W)` to `(B, H, W, C)` or `(B, C)`."""

    def __init__(
        self,
        module: torch.nn.Module,
        settings: TeacherSettings,
        *,
        name: str,
        licence: str,
        source: str,
        preprocessor: Preprocessor,
        fingerprint: Fingerprint,
    ) -> None:
        super().__init__(name=name, licence=licence, source=source, preprocessor=preprocessor, fingerprint=fingerprint)
        self.device = _device(name, settings.device)
        self._dtype = _DTYPES[settings.compute_dtype]
        module = module.eval().requires_grad_(False).to(device=self.device)
        # Convolutions on tensor cores read channels last; the pixels are brought to the same layout in `encode`.
        self._module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._compiled = settings.compile
        self._forward = torch.compile(self._module) if settings.compile else self._module

    def encode(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        """Return float32 features on the teacher's device: `(B, H, W, C)`, or `(B, C)` without a grid.

        Raises TeacherError unless `pixels_bchw` is `(B, 3, H, W)` of the preprocessor's size.
        """
        self._require_size(pixels_bchw)
        return self._run(pixels_bchw)

    def _require_size(self, pixels_bchw: torch.Tensor) -> None:
        """Raise TeacherError unless the pixels are `(B, 3, H, W)` of the preprocessor's size."""
        height, width = self.preprocessor.output_size
        if pixels_bchw.ndim != 4 or tuple(pixels_bchw.shape[1:]) != (3, height, width):
            raise TeacherError(
                f"{self.name}: pixels have shape {tuple(pixels_bchw.shape)}, expected (batch, 3, {height}, {width})",
                "Make the pixels with this teacher's own preprocessor.",
            )

    def _run(self, *inputs_bchw: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(), self._arithmetic():
            moved = [
                each.to(self.device, torch.float32, non_blocking=True, memory_format=torch.channels_last)
                for each in inputs_bchw
            ]
            if self._compiled and len(moved[0]) > 1:
                # One graph for all batch sizes from the start (a batch of one has its own): graphs specialised
                # to sizes would make the numbers of a batch depend on which sizes came before it. Height and
                # width never change; leaving them symbolic too made Swin take minutes to trace.
                for each in moved:
                    torch._dynamo.mark_dynamic(each, 0)
            features: torch.Tensor = self._forward(*moved)
            return features.float().contiguous()

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.device.type == "cuda":
                # By default cuDNN rounds float32 convolutions to TF32 and may choose kernels that differ from
                # run to run.
                stack.enter_context(
                    torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
                )
            if self._dtype is not torch.float32:
                stack.enter_context(torch.autocast(self.device.type, dtype=self._dtype))
            yield


def _device(teacher: str, wanted: str | torch.device) -> torch.device:
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with the device
        raise TeacherError(f"{teacher}: device {wanted} cannot be used: {error}", "Use --device cpu.") from error
    return device


def make_config(config_class: type[Any], values: Mapping[str, Any], checkpoint: Checkpoint) -> Any:
    """Make a transformers config from JSON values; raises TeacherError where they are not usable."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        return config_class.from_dict(dict(values))
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        raise checkpoint.error(
            f"config.json does not describe a {config_class.__name__[:-6]} model: {error}",
            "Use the config.json that was published with the weights.",
        ) from error


def whole_number(value: object, name: str, checkpoint: Checkpoint) -> int:
    """Return a setting of config.json that must be one number; raises TeacherError for a pair or nothing."""
    if not isinstance(value, int):
        raise checkpoint.error(
            f"config.json gives {name} as {value!r}, expected one whole number",
            "Use the config.json that was published with the weights.",
        )
    return value


def load_strictly(
    model_class: type[Model],
    config: PretrainedConfig,
    tensors: Mapping[str, torch.Tensor],
    checkpoint: Checkpoint,
    **arguments: Any,
) -> Model:
    """Build a model in float32 from exactly these tensors, with SDPA attention where the class has it.

    transformers fills what is missing with random numbers and only warns; here a missing, surplus or
    misshapen tensor raises TeacherError that names the first few. `arguments` go to the constructor
    of the class.
    """
    with quiet_transformers():
        try:
            # The declared type leaves out the pair that `output_loading_info` asks for.
            loaded: Any = model_class.from_pretrained(
                None,
                config=config,
                state_dict=dict(tensors),
                dtype=torch.float32,
                attn_implementation="sdpa" if model_class._supports_sdpa else "eager",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **arguments,
            )
            model: Model = loaded[0]
            info: dict[str, Any] = loaded[1]
        except (RuntimeError, ValueError, TypeError) as error:
            raise checkpoint.error(
                f"the weights do not load as {model_class.__name__}: {error}",
                "Use the weights and the config.json of one published checkpoint.",
            ) from error
    wrong = [
        f"{len(names)} {what} ({', '.join(sorted(map(_tensor_name, names))[:3])}{', …' if len(names) > 3 else ''})"
        for what, names in (
            ("missing", info["missing_keys"]),
            ("unexpected", info["unexpected_keys"]),
            ("of another shape", info["mismatched_keys"]),
        )
        if names
    ]
    if wrong:
        raise checkpoint.error(
            f"the weights are not those of the {model_class.__name__} that config.json describes: "
            f"tensors {'; '.join(wrong)}",
            "Use the weights and the config.json of one published checkpoint.",
        )
    return model


def _tensor_name(key: str | tuple[Any, ...]) -> str:
    return key if isinstance(key, str) else str(key[0])


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep progress bars and load reports of transformers off the screen: what matters is raised."""
    from transformers.utils import logging as transformers_logging

    untyped: Any = transformers_logging
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    untyped.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            untyped.enable_progress_bar()
