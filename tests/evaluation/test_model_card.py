"""A run on the Hub: its files, and a model card of what they say."""


def test_push_to_hub_writes_a_card_and_leaves_checkpoints_at_home(run, monkeypatch):
    import huggingface_hub
    from diffusers.utils import hub_utils
    from huggingface_hub.utils import filter_repo_objects

    sent = {}

    class Repo:
        repo_id = "me/out"

    class NoCardYet(huggingface_hub.errors.EntryNotFoundError):
        def __init__(self):
            pass

    def no_card(*_, **__):
        raise NoCardYet

    monkeypatch.setattr(
        huggingface_hub, "create_repo", lambda name, **kw: sent.update(name=name, **kw) or Repo
    )
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **kw: sent.update(kw))
    monkeypatch.setattr(hub_utils.ModelCard, "load", no_card)
    out = run("--max_train_steps=1", "--train_params", "conv_out", "--push_to_hub")
    assert sent["name"] == "out" and sent["repo_id"] == "me/out"
    files = [str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()]
    uploaded = list(filter_repo_objects(files, ignore_patterns=sent["ignore_patterns"]))
    assert "README.md" in uploaded and "unet/diffusion_pytorch_model.safetensors" in uploaded
    assert not [f for f in uploaded if "checkpoint" in f]
    assert "stable-video-diffusion" in (out / "README.md").read_text()
