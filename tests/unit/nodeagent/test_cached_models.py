from pathlib import Path

from nodeagent.cached_models import MODELS_MAX, cached_models, hub_cache


def test_finished_downloads_are_named_as_deployments_name_them(tmp_path: Path) -> None:
    (tmp_path / "models--Qwen--Qwen2.5-7B-Instruct" / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / "models--gpt2" / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / "models--org--never-finished" / "blobs").mkdir(parents=True)
    (tmp_path / "models--org--empty" / "snapshots").mkdir(parents=True)
    (tmp_path / "datasets--org--data" / "snapshots" / "abc").mkdir(parents=True)
    assert cached_models(tmp_path) == ["Qwen/Qwen2.5-7B-Instruct", "gpt2"]
    assert cached_models(tmp_path / "nothing") == []


def test_the_list_has_a_bound(tmp_path: Path) -> None:
    for index in range(MODELS_MAX + 5):
        (tmp_path / f"models--org--{index}" / "snapshots" / "abc").mkdir(parents=True)
    assert len(cached_models(tmp_path)) == MODELS_MAX


def test_the_cache_is_where_the_hub_library_keeps_it() -> None:
    assert hub_cache({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}) == Path("/a")
    assert hub_cache({"HF_HOME": "/b"}) == Path("/b/hub")
    assert hub_cache({"XDG_CACHE_HOME": "/c"}) == Path("/c/huggingface/hub")
