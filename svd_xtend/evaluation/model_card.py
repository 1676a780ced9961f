"""A run on the Hub: its files, and a model card of what they say.

push_to_hub(args)                   what --push_to_hub does at the end of a run
text("outputs/lora", "me/lora")     the card, by model_card_template.md
"""

import re
from pathlib import Path

from svd_xtend.data import folder_index
from svd_xtend.evaluation import report
from svd_xtend.models import loading, lora
from svd_xtend.training import run_record, validation_loss

BEGINS, ENDS = "<!-- SVD Xtend writes what follows anew with each push -->", "<!-- until here -->"
TAGS = ("stable-video-diffusion", "image-to-video")
LEFT_OUT = [  # what only resuming needs, what trackers keep, what a killed write left, what the mp4 beside it shows in less
    "checkpoint-*", "abandoned-*", "partial-*", "*.partial", "logs/*", "wandb/*", "validation/*.gif", "validation/*.png",
]  # fmt: skip


def push_to_hub(args):
    """Upload the run with a model card, without checkpoints. Needs `hf auth login` or HF_TOKEN."""
    from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
    from huggingface_hub import create_repo, upload_folder

    name = args.hub_model_id or Path(args.output_dir).name
    repo = create_repo(name, exist_ok=True).repo_id
    base = str(args.pretrained_model_name_or_path)
    told = f"{BEGINS}\n\n{text(args.output_dir, repo)}\n\n{ENDS}"
    card = load_or_create_model_card(
        repo, from_training=True, inference=True, model_description=told,
        base_model=None if Path(base).exists() else base,  # the Hub refuses a card that names a folder there
    )  # fmt: skip
    card.text = re.sub(
        f"{BEGINS}.*{ENDS}", lambda _: told, card.text, flags=re.S
    )  # where it is of an earlier push
    card.text = re.sub(
        "#### How to use\n+```python\n# TODO.*\n```\n+", "", card.text
    )  # diffusers' own placeholder
    tags = [tag for tag in TAGS if tag not in (card.data.tags or [])]
    populate_model_card(card, tags).save(Path(args.output_dir, "README.md"))
    upload_folder(repo_id=repo, folder_path=args.output_dir, ignore_patterns=LEFT_OUT)


def text(output_dir, repo=None):
    """What the files of a run say of it, in Markdown: did it learn, how to use it, how to train it again."""
    out, told = Path(output_dir), report.read_run_facts(output_dir)
    args, repo = told["args"], repo or out.resolve().name
    base = str(args["pretrained_model_name_or_path"])
    files = {"lora": lora.LORA_FILE, "boxes": loading.BOX_CONTROL_FILE}
    found = {
        kind: f'hf_hub_download("{repo}", "{name}")'
        for kind, name in files.items()
        if (out / name).exists()
    }
    if "boxes" in found and args.get("lora"):  # which lies under the boxes as it is
        found["lora"] = f'"{args["lora"]}"'
    return report.load_template("model_card_template.md").render(
        **told, **found, repo=repo, base=base.removeprefix(f"{run_record.ROOT}/"), base_name=Path(base).name if Path(base).exists() else base,
        whole=not found and (out / "model_index.json").exists(), comparison=(out / "comparison.gif").exists(),
        page=(out / "report.html").exists(), how_many=validation_loss.count_in_words,
        fps=folder_index.DEFAULT_SOURCE_FPS if args.get("fps", "native") == "native" else f"{args['fps']:g}",
    ).strip()  # fmt: skip
