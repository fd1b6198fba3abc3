"""Models as folders: `model.safetensors`, `config.json` (all that `XT` needs), `README.md`, and
`classes.json`, the names of the classes by head, where they are known.

Loading is strict: every tensor of the model is in the file, and the file holds no other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, hf_hub_download
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from torch import nn

from .journal import sync_file, sync_folder

CARD, CLASSES = "README.md", "classes.json"


class HubModel(ModelHubMixin, library_name="xt-kernels"):
    """`save_pretrained`, `from_pretrained` and `push_to_hub` for a module with a `config`, the
    dataclass that its class is built from, and `class_names`.
    """

    config: Any
    class_names: dict[str, tuple[str, ...]]

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> str | None:
        """Writes the model to a folder, made if it is not there.

        repo_id, push_to_hub, options: as in `ModelHubMixin`. model_card_kwargs: of
        `generate_model_card`; a README.md that is there already stays.

        No file stands half-written under its final name. Over an older model, config.json goes
        first and comes back last, so that a folder never mixes two models and still loads.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".part-", dir=folder) as part:
            super().save_pretrained(
                part, config=asdict(self.config), model_card_kwargs=model_card_kwargs
            )
            for name in (CONFIG_NAME, CLASSES):
                (folder / name).unlink(missing_ok=True)
            for name in (CARD, CLASSES, SAFETENSORS_SINGLE_FILE, CONFIG_NAME):
                if Path(part, name).exists() and (name != CARD or not (folder / CARD).exists()):
                    sync_file(Path(part, name))
                    os.replace(Path(part, name), folder / name)
        sync_folder(folder)
        if not push_to_hub:
            return None
        url: str = self.push_to_hub(
            repo_id=repo_id or folder.name, model_card_kwargs=model_card_kwargs, **options
        )
        return url

    def _save_pretrained(self, save_directory: Path) -> None:
        from safetensors.torch import save_file

        assert isinstance(self, nn.Module)
        state: dict[str, torch.Tensor] = {}
        memory = set()
        for name, tensor in self.state_dict().items():
            # The file holds a tensor that has two names, as in DETR, twice.
            is_shared = tensor.untyped_storage().data_ptr() in memory
            memory.add(tensor.untyped_storage().data_ptr())
            state[name] = tensor.clone() if is_shared else tensor.contiguous()
        if self.class_names:
            text = json.dumps(self.class_names, indent=1, ensure_ascii=False)
            (save_directory / CLASSES).write_text(text + "\n")
        save_file(state, save_directory / SAFETENSORS_SINGLE_FILE, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """The model of a folder, or of a repository "user/name" of the hub, in evaluation mode.

        options: `map_location`, the device of the weights ("cpu"), and those of `ModelHubMixin`
            (revision, token, cache_dir, force_download, local_files_only).

        Raises ValueError for a folder without config.json, a config that does not build a model,
        and weights of another architecture; ConnectionError if the hub does not have it either.
        """
        name = str(pretrained_model_name_or_path)
        if Path(name).is_dir() and not Path(name, CONFIG_NAME).is_file():
            raise ValueError(f"{cls.__name__}: {name} must hold {CONFIG_NAME}, found none.")
        try:
            model: Self = super().from_pretrained(name, **options)
        except (EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise ConnectionError(
                f"{cls.__name__}: {name} is no folder, and could not be had from the hub "
                f"({type(error).__name__})."
            ) from error
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{cls.__name__}: {CONFIG_NAME} of {name} must be JSON ({error})."
            ) from error
        return model

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        map_location: str | torch.device = "cpu",
        config: Any = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **model_kwargs: Any,
    ) -> Any:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if config is None:
            raise ValueError(f"{cls.__name__}: {model_id} must hold {CONFIG_NAME}, found none.")
        with torch.random.fork_rng(devices=[]):  # of the weights that are about to be replaced
            model: Any = cls(config=config, **model_kwargs)

        def find(name: str) -> Path:
            if Path(model_id).is_dir():
                return Path(model_id, name)
            return Path(
                hf_hub_download(
                    model_id,
                    name,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )

        file = find(SAFETENSORS_SINGLE_FILE)
        with suppress(EntryNotFoundError):
            model.class_names = _read_class_names(find(CLASSES))
        try:
            state = load_file(file, device=str(map_location))
        except SafetensorError as error:
            raise ValueError(f"{file} must be a whole safetensors file ({error}).") from error
        check_state(state, model.state_dict(), str(file))
        model.load_state_dict(state)
        return model.to(map_location).eval()

    def generate_model_card(self, *args: Any, origin: str = "", **kwargs: Any) -> ModelCard:
        """The README.md of a saved model. origin: where its weights come from, Markdown."""
        assert isinstance(self, nn.Module)
        config = asdict(self.config)
        data = ModelCardData(library_name="xt-kernels", tags=["xt", "large-images"])
        parameters = sum(p.numel() for p in self.parameters())
        rows = "\n".join(f"| {name} | {value} |" for name, value in config.items())
        return ModelCard(
            f"---\n{data.to_yaml()}\n---\n\n"
            f"# xT, {config['encoder']}, context {config['context']}\n\n"
            f"A vision model for very large images (nested tokenization, arXiv 2403.01915), "
            f"{parameters / 1e6:.2f} M parameters.\n\n"
            + (f"{origin}\n\n" if origin else "")
            + "```python\nimport xt_models as xm\n\n"
            'model = xm.XT.from_pretrained("FOLDER")  # this folder, or its name on the hub\n```\n'
            f"\n| setting | value |\n| --- | --- |\n{rows}\n"
        )


def _read_class_names(path: Path) -> dict[str, tuple[str, ...]]:
    """Names of classes by head; none if there is no such file."""
    if not path.exists():
        return {}
    rule = f"{path} must hold lists of names by head, as JSON"
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{rule} ({error}).") from error
    if not isinstance(found, dict) or not all(
        isinstance(names, list) and all(isinstance(n, str) for n in names)
        for names in found.values()
    ):
        raise ValueError(f"{rule}, found {str(found)[:40]}.")
    return {head: tuple(names) for head, names in found.items()}


def check_state(
    state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], where: str
) -> None:
    """Raises ValueError unless both hold the same names with the same shapes.

    where: what the message calls the place that state is from.
    """
    shapes = [
        f"{name} {list(state[name].shape)} for {list(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    found = [
        f"{len(names)} {what} ({', '.join(names[:4])}{', ...' * (len(names) > 4)})"
        for what, names in (
            ("missing", [name for name in expected if name not in state]),
            ("unexpected", [name for name in state if name not in expected]),
            ("of another shape", shapes),
        )
        if names
    ]
    if found:
        raise ValueError(
            f"{where} must hold the weights of this architecture, found tensors {', '.join(found)}."
        )
