"""A small network, its weights in every format, and what a file that is refused must leave."""

from __future__ import annotations

import json
import pickle
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vitrail.folder import FolderError
from vitrail.models.backbone import Backbone
from vitrail.models.registry import build_model
from vitrail.weights.load import load_weights
from vitrail.weights.read import CheckpointError

LONGEST = 2500
"""characters of a message beside its path"""


class Part(nn.Module):
    """A module that holds whatever it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def nested(state: dict[str, Tensor]) -> nn.Module:
    """Modules in one another, as dotted names say: whole numbers buffers, others parameters."""
    root = Part()
    for name, value in state.items():
        *path, last = name.split(".")
        module: nn.Module = root
        for step in path:
            if step not in dict(module.named_children()):
                module.add_module(step, Part())
            module = module.get_submodule(step)
        if value.is_floating_point():
            module.register_parameter(last, nn.Parameter(value))
        else:
            module.register_buffer(last, value)
    return root


class Workshop:
    """Makes files of weights in a folder."""

    formats = ("safetensors", "torch", "legacy", "npz", "small_npz")

    def __init__(self, place: Path) -> None:
        self.place = place

    def network(self, **options: Any) -> Backbone:
        torch.manual_seed(0)
        return build_model("vit_debug", **{"embed_dim": 12, "depth": 1, "num_classes": 2} | options)

    def state(self, **options: Any) -> dict[str, Any]:
        """Weights that fit `network`, and are not its own."""
        torch.manual_seed(1)
        return {name: torch.randn_like(value) for name, value in self.network(**options).state_dict().items()}

    def safetensors(self, held: dict[str, Any], name: str = "m.safetensors") -> Path:
        save_file({name: value.contiguous() for name, value in held.items()}, self.place / name)
        return self.place / name

    def torch(self, held: Any, name: str = "m.pth") -> Path:
        torch.save(held, self.place / name)
        return self.place / name

    def legacy(self, held: Any, name: str = "m.tar") -> Path:
        torch.save(held, self.place / name, _use_new_zipfile_serialization=False)
        return self.place / name

    def torchscript(self, held: dict[str, Tensor] | nn.Module, name: str = "m.pt") -> Path:
        """Saved by PyTorch itself, which says of all of TorchScript that there are better ways."""
        module = held if isinstance(held, nn.Module) else nested(held)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            torch.jit.save(torch.jit.script(module), self.place / name)
        return self.place / name

    def pickle(self, held: Any, name: str = "m.pkl") -> Path:
        return self.bytes(pickle.dumps(held, protocol=2), name)

    def npz(self, held: dict[str, Any], name: str = "m.npz") -> Path:
        np.savez(self.place / name, **{key: value.numpy() for key, value in held.items()})
        return self.place / name

    def small_npz(self, held: dict[str, Any], name: str = "s.npz") -> Path:
        np.savez_compressed(self.place / name, **{key: value.numpy() for key, value in held.items()})
        return self.place / name

    def shards(self, held: dict[str, Any], name: str = "shards") -> Path:
        """Two files and their index in a folder, whose path this is."""
        (self.place / name).mkdir()
        places = {key: ("a" if number % 2 else "b") + ".safetensors" for number, key in enumerate(held)}
        for file in sorted(set(places.values())):
            self.safetensors({key: held[key] for key in held if places[key] == file}, f"{name}/{file}")
        (self.place / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        return self.place / name

    def archive(self, members: dict[str, bytes], name: str = "m.zip") -> Path:
        with zipfile.ZipFile(self.place / name, "w") as made:
            for member, data in members.items():
                made.writestr(member, data)
        return self.place / name

    def members(self, held: Any = None) -> dict[str, bytes]:
        """Of PyTorch's archive with `held`, else with `state`, in a folder `good`."""
        with zipfile.ZipFile(self.torch(held or self.state(), "good.pth")) as made:
            return {name: made.read(name) for name in made.namelist()}

    def bytes(self, data: bytes, name: str = "m.bin") -> Path:
        (self.place / name).write_bytes(data)
        return self.place / name

    def wrong(self, model: Backbone, path: Path) -> str:
        """What is wrong with how a bad file is refused; empty where it is as it must be."""
        before = {name: value.clone() for name, value in model.state_dict().items()}
        card = (model.preprocess, model.classes)
        try:
            load_weights(model, path)
        except (CheckpointError, FolderError) as error:
            said = str(error).replace(str(path), "")
            told = str(path) in str(error) and 20 < len(said) < LONGEST and said.isprintable()
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:100]}"
        else:
            return "loaded"
        same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        if not same or (model.preprocess, model.classes) != card:
            return "half-loaded"
        return "" if told else f"unclear: {said[:300]!r}"


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


# ---- a server


class Server(ThreadingHTTPServer):
    """A server on this machine: answers each path as `ways` says, and keeps what was asked."""

    daemon_threads = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ways: dict[str, Callable[[Handler], None]] = {}
        self.asked: list[str] = []
        self.over = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is what is tested."""

    def at(self, path: str, way: Callable[[Handler], None]) -> str:
        self.ways[path] = way
        return self.address + path


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        way = self.server.ways.get(self.path.partition("?")[0])
        way(self) if way else self.head(404, Content_Length=0)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Tests are silent."""

    def head(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=partial(made.serve_forever, poll_interval=0.01), daemon=True)
        thread.start()
        yield made
        made.over.set()
        made.shutdown()
