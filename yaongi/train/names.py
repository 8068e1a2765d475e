"""What lies in the folder of a run."""

CHECKPOINTS = "checkpoints"
MODEL = "model"
CONFIG = "config.json"
METRICS = "metrics.jsonl"
REPORT_HTML, REPORT_PNG = "report.html", "report.png"
TENSORBOARD = "tensorboard"
WANDB, WANDB_ID = "wandb", "wandb_id.json"
LOCK = ".lock"
MADE_BY_A_RUN = (CHECKPOINTS, MODEL, CONFIG, METRICS, REPORT_HTML, REPORT_PNG, TENSORBOARD, WANDB, WANDB_ID)
