"""Bicubic resize, against torch."""

from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax_ext.models import resize


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.sampled_from(["cpu", "tpu"]))
def test_bicubic_equals_torch(height, width, new_height, new_width, platform):
  torch = pytest.importorskip("torch")
  images = np.random.default_rng(0).standard_normal((2, height, width, 3))
  with jax.enable_x64(True), mock.patch.object(resize, "platform", lambda: platform):
    ours = resize.resize_bicubic(jnp.asarray(images), (new_height, new_width))
  theirs = torch.nn.functional.interpolate(
    torch.from_numpy(images).permute(0, 3, 1, 2), size=(new_height, new_width), mode="bicubic", align_corners=False
  )
  np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1).numpy(), atol=1e-10)
