"""Tasks by name, through lm-evaluation-harness: anything that turns token ids into logits answers them.

The harness (the extra ``evaluate``) brings the prompts, the metrics and the standard errors; its model here is whatever
stands behind a ``LogitsFunction``, so that a built engine is asked the same as the model it came from. Data come from
files at hand (``local_rows.py``) or as the harness gets them, from the Hugging Face hub.
"""

from amoeba_deploy.tasks.harness import TaskRequest, task_results
from amoeba_deploy.tasks.names import TASKS, NamedTask, named_task
from amoeba_deploy.tasks.result import TaskResult

__all__ = ["TASKS", "NamedTask", "TaskRequest", "TaskResult", "named_task", "task_results"]
