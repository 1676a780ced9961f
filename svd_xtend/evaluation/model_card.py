"""Upload a training run to the Hugging Face Hub, with a model card.

    push_to_hub(args)                               # --push_to_hub, at the end of a run
    render_model_card("outputs/lora", "me/lora")    # the text of the card

The card says whether the run learned, how to use its weights, and how to repeat it. model_card_template.md
is its layout.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from svd_xtend.data import folder_index
from svd_xtend.evaluation import report
from svd_xtend.models import loading, lora
from svd_xtend.training import run_record

# A later push replaces what is between these two lines, and keeps what people wrote around them.
BEGIN_MARK = "<!-- SVD Xtend writes what follows anew with each push -->"
END_MARK = "<!-- until here -->"
TAGS = ("stable-video-diffusion", "image-to-video")
NOT_UPLOADED = [
    "checkpoint-*",  # only for resuming
    "abandoned-*",
    "partial-*",  # left over from a kill
    "*.partial",
    "logs/*",  # trackers
    "wandb/*",
    "validation/*.gif",  # the mp4 shows the same in fewer bytes
    "validation/*.png",
]


def push_to_hub(args: argparse.Namespace) -> None:
    """Upload the run with a model card, without checkpoints. Needs `hf auth login` or HF_TOKEN."""
    from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
    from huggingface_hub import create_repo, upload_folder

    name = args.hub_model_id or Path(args.output_dir).name
    repo = create_repo(name, exist_ok=True).repo_id
    base_model = str(args.pretrained_model_name_or_path)
    is_local = Path(base_model).exists()
    section = f"{BEGIN_MARK}\n\n{render_model_card(args.output_dir, repo)}\n\n{END_MARK}"
    card = load_or_create_model_card(
        repo,
        from_training=True,
        inference=True,
        model_description=section,
        # the Hub refuses a card whose base model is a local folder
        base_model=None if is_local else base_model,
    )
    # the section of an earlier push
    old_section = f"{BEGIN_MARK}.*{END_MARK}"
    card.text = re.sub(old_section, lambda _: section, card.text, flags=re.S)
    # the placeholder that diffusers writes
    placeholder = "#### How to use\n+```python\n# TODO.*\n```\n+"
    card.text = re.sub(placeholder, "", card.text)
    new_tags = [tag for tag in TAGS if tag not in (card.data.tags or [])]
    card = populate_model_card(card, new_tags)
    card.save(Path(args.output_dir, "README.md"))
    upload_folder(repo_id=repo, folder_path=args.output_dir, ignore_patterns=NOT_UPLOADED)


def render_model_card(output_dir: str | Path, repo: str | None = None) -> str:
    """Return the model card of a run in Markdown.

    repo: its name on the Hub; default: the name of the folder. Raises ValueError if the folder holds no
    run.
    """
    folder = Path(output_dir)
    run = report.read_run(folder)
    if repo is None:
        repo = folder.resolve().name
    base_model = str(run.args["pretrained_model_name_or_path"])
    has_lora = (folder / lora.LORA_FILE).exists()
    has_boxes = (folder / loading.BOX_CONTROL_FILE).exists()
    # expressions of the example code that give the weights' path
    lora_path = None
    box_control_path = None
    if has_lora:
        lora_path = f'hf_hub_download("{repo}", "{lora.LORA_FILE}")'
    if has_boxes:
        box_control_path = f'hf_hub_download("{repo}", "{loading.BOX_CONTROL_FILE}")'
        if run.args.get("lora"):  # the frozen LoRA that the box control was trained on
            lora_path = f'"{run.args["lora"]}"'
    is_full_model = (folder / "model_index.json").exists() and not (has_lora or has_boxes)
    fps = run.args.get("fps", "native")
    if fps == "native":
        fps = folder_index.DEFAULT_SOURCE_FPS
    template = report.load_template("model_card_template.md")
    text = template.render(
        **vars(run),
        repo=repo,
        base_model=base_model.removeprefix(f"{run_record.ROOT}/"),
        base_model_name=Path(base_model).name if Path(base_model).exists() else base_model,
        is_full_model=is_full_model,
        lora_path=lora_path,
        box_control_path=box_control_path,
        fps=f"{fps:g}",
        has_comparison=(folder / "comparison.gif").exists(),
        has_report=(folder / "report.html").exists(),
    )
    return text.strip()
