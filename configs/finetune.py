"""Fine-tunes released weights on a dataset of yours: any TFDS classification dataset, or a folder of images.

Run: python main.py --config=configs/finetune.py:VARIANT,DATASET --workdir=DIR --config.pretrained=SOURCE
VARIANT: any name of vit_jax_ext.list_models(). DATASET: a TFDS name, or a folder (written with a slash, as ./flowers)
with CLASS/image.jpg or SPLIT/CLASS/image.jpg; or with labels.csv, where images have any number of labels. SOURCE: a
file, a run's workdir, or True for the published weights, which is the default. Another resolution:
--config.model.overrides.image_size=384. Layer-wise decay of the learning rate: --config.optimizer.layer_decay=0.75.
Linear probe: --config.linear_probe=True --config.optimizer.learning_rate=1e-2.
Hardware: one accelerator.

The values are a plain start for small datasets, no paper's.
"""

import os

from configs import common


def get_config(argument: str = "crossvit_tiny_224,digits"):
  """Returns the config of one variant on one dataset.

  Raises:
    ValueError: another argument than VARIANT,DATASET.
  """
  variant, comma, dataset = argument.partition(",")
  if not (variant and comma and dataset):
    raise ValueError("give VARIANT,DATASET, for example crossvit_tiny_224,./flowers")
  config = common.base_config()
  config.model.name = variant
  config.pretrained = True

  config.dataset.name = dataset
  config.dataset.eval_split = "test"
  config.augment.crop_scale = (0.35, 1.0)
  if "/" in dataset:
    folder = os.path.expanduser(dataset)
    splits = os.listdir(folder) if os.path.isdir(folder) else []
    named = [split for split in ("validation", "val", "test") if split in splits]
    if "train" in splits and named and "labels.csv" not in splits:
      config.dataset.eval_split = named[0]
    else:  # no splits
      config.dataset.train_split, config.dataset.eval_split = "train[:90%]", "train[90%:]"
    if any(os.path.isfile(os.path.join(folder, split, "labels.csv")) for split in ("", "train")):
      config.label_smoothing = 0.0  # most of many labels are 0, and would be pulled to 1/2
      config.augment.crop_scale = (0.7, 1.0)  # a smaller crop loses what the labels name

  config.augment.flip = 0.0 if dataset == "digits" else 0.5  # switch it off where left and right differ

  config.batch_size = 64
  config.total_steps = 1000
  config.optimizer.learning_rate = 1e-4
  config.optimizer.warmup_steps = 100
  config.optimizer.weight_decay = 1e-8  # as in Swin's and CSWin's fine-tuning: stay near the weights
  config.optimizer.clip_norm = 1.0
  config.eval_every_steps = 250
  config.checkpoint.every_steps = 250
  return config
