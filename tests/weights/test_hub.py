"""The hub, by `huggingface_hub`, from a server on this machine that says as much as a download needs to hear."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vitrail.models.registry import build_model
from vitrail.weights import fetch
from vitrail.weights.fetch import FetchError, fetch_from_hub
from vitrail.weights.load import create_model, load_weights
from vitrail.weights.read import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TIMM = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"


class Hub:
    """Repositories that a server offers."""

    def __init__(self, server: Any) -> None:
        self.server = server

    def offer(self, repo: str, name: str, data: bytes) -> None:
        self.server.at(f"/{repo}/resolve/main/{name}", answering(data))
        self.server.at(f"/{repo}/resolve/{COMMIT}/{name}", answering(data))

    def refuse(self, repo: str, name: str, status: int, code: str) -> None:
        self.server.at(f"/{repo}/resolve/main/{name}", refusing(status, code))

    def asked(self) -> list[str]:
        return [path.rpartition("/")[2] for path in self.server.asked]


def answering(data: bytes) -> Callable[[Any], None]:
    def answer(handler: Any) -> None:
        tag = hashlib.sha256(data).hexdigest()
        handler.head(200, ETag=f'"{tag}"', X_Repo_Commit=COMMIT, Content_Length=len(data))
        if handler.command == "GET":
            handler.wfile.write(data)

    return answer


def refusing(status: int, code: str) -> Callable[[Any], None]:
    return lambda handler: handler.head(status, X_Error_Code=code, Content_Length=0)


@pytest.fixture
def hub(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """What HF_ENDPOINT and HF_HUB_CACHE set when they are there at the start."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "".join(template[1:]))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return Hub(server)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def go() -> None:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    return go


def test_a_file_and_what_says_how_it_is_used(hub: Hub, offline: Callable[[], None]):
    hub.offer("org/name", "model.safetensors", b"weights")
    hub.offer("org/name", "config.json", b"{}")
    path = fetch_from_hub("org/name", "model.safetensors")
    assert path.read_bytes() == b"weights" and path.with_name("config.json").read_bytes() == b"{}"
    offline()
    hub.server.asked.clear()
    assert fetch_from_hub("org/name", "model.safetensors") == path and hub.server.asked == []
    with pytest.raises(FetchError, match=r"org/name: other\.bin is not in the hub's cache, and HF_HUB_OFFLINE is set"):
        fetch_from_hub("org/name", "other.bin")


def test_what_the_hub_has_not_is_an_error_that_names_it(hub: Hub):
    hub.offer("org/name", "model.safetensors", b"weights")
    hub.refuse("org/none", "model.safetensors", 404, "RepoNotFound")
    hub.refuse("org/gated", "model.safetensors", 403, "GatedRepo")
    hub.refuse("org/name", "absent", 404, "EntryNotFound")
    for repo, name in (("org/none", "model.safetensors"), ("org/gated", "model.safetensors"), ("org/name", "absent")):
        with pytest.raises(FetchError, match=rf"^{repo}: {name} could not be had \(.*\): look at the name"):
            fetch_from_hub(repo, name)
    for repo in ("../etc", "a/b/c", "org/..", "", "org/na me"):
        with pytest.raises(FetchError, match="could not be had"):
            fetch_from_hub(repo, "model.safetensors")


def test_a_hub_that_cannot_be_reached_is_an_error_unless_the_cache_has_it(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    hub.offer("org/name", "model.safetensors", b"weights")
    path = fetch_from_hub("org/name", "model.safetensors")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # it tries again, later and later
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )
    assert fetch_from_hub("org/name", "model.safetensors") == path
    with pytest.raises(FetchError, match=r"other\.bin is not in the hub's cache, and the hub could not be reached"):
        fetch_from_hub("org/name", "other.bin")


def test_any_repository_of_the_hub_becomes_a_network(hub: Hub, shop: Any):
    row = build_model("vit_debug")
    state = {name: torch.randn_like(value) for name, value in row.state_dict().items()}
    hub.offer("org/name", "model.safetensors", shop.safetensors(state).read_bytes())
    said = {"input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.9}
    hub.offer("org/name", "config.json", json.dumps({"architecture": "vit_debug", "pretrained_cfg": said}).encode())
    model = create_model("hf-hub:org/name", pretrained=True)
    assert (
        model.variant == "vit_debug" and model.preprocess.mean == (0.1, 0.2, 0.3) and model.preprocess.crop_pct == 0.9
    )
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    load_weights(row, "hf-hub:org/name")
    assert torch.equal(row.cls_token, state["cls_token"])


def test_a_repository_of_pickles_too_and_a_missing_one_names_the_usual_file(hub: Hub, shop: Any):
    state = build_model("vit_debug").state_dict()
    hub.offer("org/name", "pytorch_model.bin", shop.torch(state).read_bytes())
    model = create_model("hf-hub:org/name", pretrained=True)
    assert torch.equal(model.cls_token, state["cls_token"])
    for name in ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin"):
        hub.refuse("org/none", name, 404, "RepoNotFound")
    with pytest.raises(FetchError, match=r"org/none: model\.safetensors could not be had"):
        create_model("hf-hub:org/none", pretrained=True)


INDEX = "model.safetensors.index.json"


def offer_shards(hub: Hub, shop: Any, repo: str = "org/large") -> dict[str, Any]:
    """A repository in two parts; its tensors."""
    state = shop.state(embed_dim=48, depth=3, num_classes=10)
    for file in shop.shards(state).iterdir():
        hub.offer(repo, file.name, file.read_bytes())
    hub.offer(repo, "config.json", json.dumps({"architecture": "vit_debug"}).encode())
    return state


def test_a_repository_in_parts_becomes_a_network_and_stays_in_the_cache(hub: Hub, shop: Any, offline: Any):
    state = offer_shards(hub, shop)
    for _ in range(2):
        model = create_model("hf-hub:org/large", pretrained=True)
        assert model.variant == "vit_debug" and all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
        offline()
        hub.server.asked.clear()
    assert hub.server.asked == []


def test_parts_are_of_the_commit_of_their_index(hub: Hub, shop: Any):
    offer_shards(hub, shop)
    for name in ("a.safetensors", "b.safetensors"):
        hub.refuse("org/large", name, 500, "Another commit since")
    assert create_model("hf-hub:org/large", pretrained=True).variant == "vit_debug"
    assert hub.asked().count("config.json") == 2  # what there is and the file itself, once for all parts


def test_a_file_is_taken_before_an_index(hub: Hub, shop: Any):
    offer_shards(hub, shop)
    state = shop.state(embed_dim=48, depth=3, num_classes=10)
    hub.offer("org/large", "pytorch_model.bin", shop.torch(state).read_bytes())
    create_model("hf-hub:org/large", pretrained=True)
    assert INDEX not in hub.asked()


def test_a_part_that_is_not_there_is_an_error_that_names_it(hub: Hub, shop: Any):
    offer_shards(hub, shop)
    hub.server.at(f"/org/large/resolve/{COMMIT}/b.safetensors", refusing(404, "EntryNotFound"))
    with pytest.raises(FetchError, match=r"^org/large: b\.safetensors could not be had"):
        create_model("hf-hub:org/large", pretrained=True)


@pytest.mark.parametrize(("index", "message"), [
    ({"weight_map": {"x": "../../a.safetensors"}}, "parts must lie beside their index; got '../../a.safetensors'"),
    ({"weight_map": {"x": "sub/a.safetensors"}}, "parts must lie beside their index"),
    ({"weight_map": {"x": 5}}, "parts must lie beside their index; got 5"),
    ({"weight_map": 3}, "damaged, not readable as an index .*: fetch it again"),
    ([], "damaged, not readable as an index"),
    ({"weight_map": {str(i): f"{i}.bin" for i in range(1001)}}, "names 1,001 files; at most 1,000 are fetched: give a"),
])  # fmt: skip
def test_an_index_of_the_hub_is_looked_at_before_anything_that_it_names_is_asked_for(hub: Hub, index, message: str):
    hub.offer("org/bad", INDEX, json.dumps(index).encode())
    with pytest.raises(CheckpointError, match=message):
        create_model("hf-hub:org/bad", pretrained=True)
    usual = {"model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin", INDEX}
    assert set(hub.asked()) <= usual | {"config.json", "preprocessor_config.json"}


def test_parts_that_are_more_than_any_checkpoint_has_are_not_all_fetched(hub: Hub, shop: Any, monkeypatch):
    offer_shards(hub, shop)
    monkeypatch.setattr(fetch, "MAX_BYTES", 1000)
    with pytest.raises(FetchError, match="org/large: more than 1,000 bytes, which no checkpoint has: look at the name"):
        create_model("hf-hub:org/large", pretrained=True)
    assert "b.safetensors" not in hub.asked()


def test_published_weights_by_their_name(hub: Hub, shop: Any):
    """Of their real shapes, in half precision."""
    torch.manual_seed(0)
    state = build_model("vit_tiny_patch16_224").state_dict()
    half = {name: (torch.randn_like(value) * 0.02).half() for name, value in state.items()}
    hub.offer(TIMM, "model.safetensors", shop.safetensors(half).read_bytes())
    model = create_model(TIMM.partition("/")[2], pretrained=True)
    assert model.preprocess.mean == (0.5, 0.5, 0.5) and model.preprocess.crop_pct == 0.9 and model.num_classes == 1000
    assert all(torch.equal(value, half[name].float()) for name, value in model.state_dict().items())
    other = create_model("vit_tiny_patch16_224", pretrained=True, num_classes=3, img_size=96)
    assert other.head.weight.shape == (3, 192) and other.pos_embed.shape == (1, 37, 192)
    assert other.preprocess.img_size == (96, 96)
    assert hub.asked().count("model.safetensors") == 3  # looked for, fetched, looked for again


def test_a_hub_that_cannot_be_reached_is_waited_for_once(monkeypatch: pytest.MonkeyPatch, shop: Any):
    """The other names are looked for in the cache alone."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[tuple[str, bool]] = []
    held: dict[str, Path] = {}

    def download(repo: str, name: str, revision: str | None = None, local_files_only: bool = False) -> str:
        asked.append((name, local_files_only))
        if name not in held:
            raise LocalEntryNotFoundError("no network")
        return str(held[name])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(
        FetchError, match=r"org/x: model.safetensors is not in the hub's cache, and the hub could not be"
    ):
        create_model("hf-hub:org/x", pretrained=True)
    assert len(asked) > 3 and [name for name, cached in asked if not cached] == ["model.safetensors"]
    asked.clear()
    held["pytorch_model.bin"] = shop.torch(build_model("vit_debug").state_dict(), "pytorch_model.bin")
    assert create_model("hf-hub:org/x", pretrained=True).variant == "vit_debug"
    assert [name for name, cached in asked if not cached] == ["model.safetensors"]
