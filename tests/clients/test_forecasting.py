"""darts and pytorch-forecasting, whose default optimizer is Adam, with the callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from am_lightning import AdaptiveMemory, AMAdamW
from tests.clients import client

pytestmark = [pytest.mark.nightly("clients"), pytest.mark.slow]
SERIES = np.sin(np.arange(120) / 5).astype(np.float32)


def test_darts(tmp_path: Path) -> None:
    client("darts")
    client("pytorch_lightning")
    from darts import TimeSeries
    from darts.models import NBEATSModel

    trainer = {"accelerator": "cpu", "callbacks": [AdaptiveMemory()], "enable_progress_bar": False, "logger": False}
    sizes = {"input_chunk_length": 16, "output_chunk_length": 4, "num_stacks": 1, "num_blocks": 1, "layer_widths": 8}
    series = TimeSeries.from_values(SERIES)
    model = NBEATSModel(**sizes, n_epochs=1, pl_trainer_kwargs=trainer, work_dir=str(tmp_path))
    model.fit(series)
    assert isinstance(model.trainer.optimizers[0], AMAdamW)
    assert len(model.predict(4)) == 4
    model.save(str(tmp_path / "model.pt"))
    loaded: Any = NBEATSModel.load(str(tmp_path / "model.pt"), trusted=True)
    loaded.fit(series, epochs=2)
    assert isinstance(loaded.trainer.optimizers[0], AMAdamW)


def test_pytorch_forecasting(tmp_path: Path) -> None:
    forecasting = client("pytorch_forecasting")
    import lightning.pytorch as pl
    import pandas

    frame = pandas.DataFrame({"t": range(len(SERIES)), "series": "a", "y": SERIES})
    roles = {"time_idx": "t", "target": "y", "group_ids": ["series"], "time_varying_unknown_reals": ["y"]}
    data = forecasting.TimeSeriesDataSet(frame, **roles, max_encoder_length=12, max_prediction_length=3)
    model = forecasting.TemporalFusionTransformer.from_dataset(data, hidden_size=4, optimizer="adam")
    options: dict[str, Any] = {"enable_progress_bar": False, "logger": False, "default_root_dir": tmp_path}
    callbacks = [AdaptiveMemory()]
    trainer = pl.Trainer(max_steps=3, accelerator="cpu", gradient_clip_val=0.1, callbacks=callbacks, **options)
    trainer.fit(model, data.to_dataloader(train=True, batch_size=16, num_workers=0))
    assert isinstance(trainer.optimizers[0], AMAdamW)
