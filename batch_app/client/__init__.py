"""The Python client of a batch server. Imports neither engine nor server.

```python
from batch_app.client import BatchClient

with BatchClient("http://localhost:8080") as client:
    batch = client.submit("requests.jsonl", model="demo")
    batch = client.wait(batch)
    for result in client.results(batch):
        print(result.custom_id, result.text)
```

What goes wrong is raised as one of `batch_app.errors`: `BadLines` for a file that can't run,
`NotFound`, `Conflict`, `ServerUnreachable` and their kin.
"""

from batch_app.client.client import BatchClient
from batch_app.client.results import Result, ResultError
from batch_app.client.source import Source
from batch_app.client.states import Batch, Estimate, Model, Paused, Progress, Usage
from batch_app.client.webhooks import Delivery, Webhook

__all__ = [
    "Batch",
    "BatchClient",
    "Delivery",
    "Estimate",
    "Model",
    "Paused",
    "Progress",
    "Result",
    "ResultError",
    "Source",
    "Usage",
    "Webhook",
]
