"""TFDS builder of the embedded dataset: the 1,797 scanned digits that scikit-learn carries."""

import numpy as np
import tensorflow_datasets as tfds


class Digits(tfds.core.GeneratorBasedBuilder):
  """8x8 scans of handwritten digits, 1,437 for training and 360 for testing, the classes in equal shares.

  The split is fixed and stratified. Preparing it needs no network: the images come with scikit-learn.
  """

  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
      description="Handwritten digits, 8x8 pixels with 17 levels of grey, white ink on black.",
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
          "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
        }
      ),
      supervised_keys=("image", "label"),
      homepage="https://scikit-learn.org/stable/datasets/toy_dataset.html#digits-dataset",
      citation="Alpaydin, Kaynak: Optical Recognition of Handwritten Digits. UCI Machine Learning Repository, 1998.",
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    import sklearn.datasets  # half a second, for what happens once
    import sklearn.model_selection

    digits = sklearn.datasets.load_digits()
    train, test = sklearn.model_selection.train_test_split(
      np.arange(len(digits.target)), test_size=360, stratify=digits.target, random_state=0
    )
    return {"train": self._generate_examples(digits, train), "test": self._generate_examples(digits, test)}

  def _generate_examples(self, digits, indices: np.ndarray):
    for i in indices.tolist():
      image = np.round(digits.images[i] * (255 / 16)).astype(np.uint8)[..., None]
      yield i, {"image": image, "label": int(digits.target[i])}
