"""Uploading a run to the Hub. Tests of the card's text are in tests/training/test_trackers.py."""


def test_push_to_hub_writes_a_card_and_uploads_no_checkpoints(run, monkeypatch):
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

    def create_repo(name, **options):
        sent.update(name=name, **options)
        return Repo

    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **options: sent.update(options))
    monkeypatch.setattr(hub_utils.ModelCard, "load", no_card)
    out = run("--max_train_steps=1", "--train_params", "conv_out", "--push_to_hub")
    assert sent["name"] == "out"
    assert sent["repo_id"] == "me/out"
    files = [str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()]
    uploaded = list(filter_repo_objects(files, ignore_patterns=sent["ignore_patterns"]))
    assert "README.md" in uploaded
    assert "unet/diffusion_pytorch_model.safetensors" in uploaded
    assert not [file for file in uploaded if "checkpoint" in file]
    assert "stable-video-diffusion" in (out / "README.md").read_text()
