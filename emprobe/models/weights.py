"""The files of a checkpoint: where they lie, whether they can be used, and the weights and tokenizer made from them."""

from __future__ import annotations

import importlib.util
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from emprobe.errors import EmprobeError, MissingExtraError
from emprobe.files import content_hash, file_hash, read_json

logger = logging.getLogger(__name__)

Quantization = Literal["8bit", "4bit"]
PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")
WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")


def weights_fingerprint(directory: Path) -> str:
    """SHA-256 over the names and bytes of the weight files in a directory (16 hex digits)."""
    files = sorted(f for pattern in WEIGHT_PATTERNS for f in directory.glob(pattern))
    return content_hash([[file.name, file_hash(file)] for file in files])


def local_directory(path: str, revision: str | None) -> Path:
    """Where the files of a directory or hub id lie on this disk; raises `EmprobeError` if nowhere."""
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.exists():
        raise EmprobeError(f"Checkpoint {path!r} is a file. Give the directory that holds config.json and the weights.")
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise EmprobeError(f"Checkpoint {path!r} was asked for, but there is no such directory. Check the path.")
    why = ""
    for name in ("config.json", "adapter_config.json"):
        try:
            found = cached_file(path, name, revision=revision)
        except (OSError, ValueError) as error:
            why = why or str(error).strip().splitlines()[0]
        else:
            if name == "adapter_config.json":
                # A whole model's weights come with from_pretrained; an adapter is loaded from this directory.
                with suppress(OSError):
                    cached_file(path, "adapter_model.safetensors", revision=revision)
            return Path(str(found)).parent
    at = f" at revision {revision!r}" if revision else ""
    raise EmprobeError(
        f"Checkpoint {path!r} is no directory here, and as a hub id it could not be read{at}: {why} "
        "Check the spelling, the network, or your access token."
    )


def check_config(path: str, directory: Path) -> dict[str, Any]:
    """The settings in `config.json`, if they are those of a model that can be loaded.

    Raises:
        EmprobeError: If there are none, the model needs code of its own, or it is an encoder-decoder.
    """
    if not (directory / "config.json").is_file():
        raise EmprobeError(
            f"Checkpoint {path!r} has no config.json, so its architecture is unknown; found: "
            f"{', '.join(sorted(f.name for f in directory.iterdir())[:8]) or 'nothing'}. Was it saved by save_pretrained?"
        )
    config: dict[str, Any] = read_json(directory / "config.json")
    kind, code = config.get("model_type"), config.get("auto_map")
    if code and kind not in CONFIG_MAPPING:
        raise EmprobeError(
            f"Checkpoint {path!r} (model_type {kind!r}) asks for code of its own ({next(iter(code.values()))}), which emprobe never runs; "
            f"transformers {transformers.__version__} has no such architecture. Convert it to one that transformers has."
        )
    if code:
        logger.warning("Checkpoint %r brings code of its own, which is not run: it is loaded as transformers' own %r.", path, kind)
    if config.get("is_encoder_decoder"):
        raise EmprobeError(f"Checkpoint {path!r} ({kind}) is an encoder-decoder. Give a decoder-only language model.")
    return config


def placed(path: str, dtype: str | torch.dtype, device_map: str | None) -> dict[str, Any]:
    """What transformers has to be told of number format and devices.

    Raises:
        EmprobeError: If there is no such dtype, no such device, or accelerate is absent.
    """
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise EmprobeError(f"{path!r} was asked for with dtype={dtype!r}, which is no dtype of torch. Use 'auto', 'float32' or 'bfloat16'.")
    if device_map is None:
        return {"dtype": dtype}
    if importlib.util.find_spec("accelerate") is None:
        raise EmprobeError(
            f"Placing {path!r} by device_map needs the package 'accelerate', which comes with peft. Run: pip install accelerate"
        )
    if device_map not in PLACEMENTS:
        _check_device(path, device_map)
    return {"dtype": dtype, "device_map": device_map}


def _check_device(path: str, name: str) -> None:
    try:
        torch.empty(0, device=torch.device(name))
    except (RuntimeError, AssertionError) as error:  # the one for an unknown name, the other for a torch without CUDA
        raise EmprobeError(
            f"{path!r} was asked for with device_map={name!r}, which is not to be had here ({_first_line(error)}); torch sees "
            f"{torch.cuda.device_count()} CUDA devices. Use one of {', '.join(PLACEMENTS)}, 'cpu', 'cuda:0' and so on, or None."
        ) from error


def quantized(path: str, config: dict[str, Any], quantization: Quantization | None) -> dict[str, Any]:
    """What transformers has to be told to load the weights quantised; nothing where the checkpoint itself says it.

    Raises:
        EmprobeError: If another quantisation is asked for than there is, or than the checkpoint is stored in.
        MissingExtraError: If bitsandbytes is needed and absent.
    """
    stored = config.get("quantization_config", {}).get("quant_method")
    if quantization is not None and quantization not in get_args(Quantization):
        raise EmprobeError(f"{path!r} was asked for with quantization={quantization!r}. Use '8bit', '4bit', or None.")
    if quantization and stored:
        raise EmprobeError(f"Checkpoint {path!r} is stored quantised ({stored}) and cannot be quantised again. Leave quantization out.")
    if (quantization or stored == "bitsandbytes") and importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError("bitsandbytes", "quantized", f"Loading {path!r} quantised")
    settings: dict[str, Any] = {"8bit": {"load_in_8bit": True}, "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
    make: Any = BitsAndBytesConfig  # untyped in transformers 5
    return {"quantization_config": make(**settings[quantization])} if quantization else {}


def _show_bars(shown: bool) -> None:
    """Turn transformers' own progress bars on or off; ours speak of the run, theirs of shards."""
    logs: Any = transformers.logging
    logs.enable_progress_bar() if shown else logs.disable_progress_bar()


def load_weights(path: str, revision: str | None, options: dict[str, Any]) -> Any:
    """The model with every weight that its settings ask for.

    Raises:
        EmprobeError: If it cannot be loaded, or lacks weights.
    """
    # The reader of a missing weight would otherwise get freshly drawn ones and a warning in the log.
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.ERROR)
    _show_bars(False)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, output_loading_info=True, trust_remote_code=False, **options
        )
    except ImportError as error:
        raise EmprobeError(
            f"Checkpoint {path!r} needs a package that is not installed: {_first_line(error)} Install it and load again."
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise EmprobeError(
            f"Checkpoint {path!r} could not be loaded as a causal language model: {_first_line(error)} "
            "The weights may be missing, cut short, or of an architecture this transformers does not know."
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
        _show_bars(bars)
    model, info = loaded
    bad = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if bad:
        raise EmprobeError(
            f"Checkpoint {path!r} lacks {len(bad)} of the weights its config.json asks for (first: {bad[0]}). They would be "
            "random numbers. Check that the files are complete and that config.json belongs to them."
        )
    return model


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def load_tokenizer(path: str, revision: str | None, chat_template: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer, with another chat template if one is given.

    Raises:
        EmprobeError: If there is none that can be used.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        own_code = "custom code" in str(error)
        why = "it asks for code of its own, which emprobe never runs. Give one saved as tokenizer.json." if own_code else _first_line(error)
        raise EmprobeError(f"Checkpoint {path!r} has no usable tokenizer: {why}") from error
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer
