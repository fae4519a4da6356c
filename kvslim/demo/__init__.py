"""A tiny trained model and the small world of stories it was trained on.

The stories (``kvslim.demo.world``) tell facts about people and ask for them
later, so a model that answers must recall over hundreds of tokens. The model in
``MODEL_DIR`` was trained by ``tools/train_demo_model.py`` on those stories.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
