"""A secret in a configuration ends the program before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from am_lightning.pretrain.runtime.errors import RecipeError
from am_lightning.pretrain.runtime.paths import find_config
from am_lightning.pretrain.runtime.run_config import read_run_config
from am_lightning.pretrain.runtime.secrets import refuse_secrets

SECRET = "hf_abcdefgh"


@pytest.mark.parametrize(
    ("config", "where"),
    [
        ({"data": {"source_options": {"token": SECRET}}}, "data.source_options.token"),
        ({"data": {"source_options": {"storage_options": {"secret": SECRET}}}}, "storage_options.secret"),
        ({"trainer": {"logger": {"init_args": {"api_key": SECRET}}}}, "trainer.logger.init_args.api_key"),
        ({"trainer": {"logger": [{"init_args": {"AWS_SECRET_ACCESS_KEY": SECRET}}]}}, "logger.0.init_args.AWS"),
        ({"data": {"source_options": {"headers": {"Authorization": f"Bearer {SECRET}"}}}}, "headers.Authorization"),
        *[({"data": {"source_options": {key: SECRET}}}, f"_options.{key}") for key in ("authToken", "pwd", "pat")],
        ({"data": {"source": f"https://host/a?sig={SECRET}&se=1"}}, "data.source "),
        ({"data": {"source_options": {"data_files": [f"https://host/a?x=1&token={SECRET}"]}}}, "data_files.0 "),
        ({"data": {"source": f"s3://host/a?X-Amz-Signature={SECRET}#b"}}, "data.source "),
        ({"data": {"source": f"https://me:{SECRET}@host/data"}}, "data.source "),
    ],
)
def test_where_it_is_and_not_what_it_is(config: dict[str, Any], where: str) -> None:
    with pytest.raises(RecipeError, match="looks like a secret") as caught:
        refuse_secrets(config)
    assert where in str(caught.value) and SECRET not in str(caught.value)


def test_what_only_sounds_like_one(tmp_path: Path) -> None:
    settings = read_run_config(["--config", str(find_config("60m")), "--trainer.default_root_dir", str(tmp_path)])
    refuse_secrets(settings.config)
    options = {"token": True, "tokenizer": "t5", "max_tokens": 7, "pad_token_id": 0, "key": "text", "api_key": None}
    refuse_secrets({"data": options | {"source": "s3://bucket/a@b:c", "monkey": "x", "keyboard_token_name": "y"}})
    refuse_secrets({"path": "a", "pattern": "*.txt", "spat": "b", "significance": "c", "url": "https://host/a?page=2"})


def test_a_run_with_one_writes_nothing(tmp_path: Path) -> None:
    words = ["--config", str(find_config("60m")), "--data.source_options", f"{{name: en, token: {SECRET}}}"]
    with pytest.raises(RecipeError, match=r"^data\.source_options\.token looks like a secret"):
        read_run_config([*words, "--trainer.default_root_dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())
