"""What the experiment families share."""

from ml_collections import ConfigDict, config_dict


def base_config() -> ConfigDict:
  """Returns a config with every key that the trainer reads, at its default; families fill in their choices.

  What the keys mean and may be is in vit_jax_ext/config_keys.py, and so in docs/config.md and `train --help`.
  """
  config = ConfigDict()
  config.seed = 0
  config.batch_size = 1024
  config.total_steps = config_dict.placeholder(int)
  config.total_epochs = config_dict.placeholder(float)

  config.model = ConfigDict()
  config.model.name = ""
  config.model.overrides = ConfigDict()  # keyword arguments of vit_jax_ext.create_model
  config.pretrained = config_dict.placeholder(object)

  config.dataset = ConfigDict()
  config.dataset.name = ""
  config.dataset.data_dir = config_dict.placeholder(str)
  config.dataset.train_split = "train"
  config.dataset.eval_split = "validation"
  config.dataset.shuffle_buffer = 50_000
  config.dataset.crop = config_dict.placeholder(float)
  config.dataset.shift = 0.0
  config.dataset.scale = 0.0
  config.dataset.max_unreadable = 0.01

  config.augment = ConfigDict()
  # On the host; see vit_jax_ext/data/input_pipeline.py.
  config.augment.crop_scale = ()
  config.augment.dct_scaling = False
  config.augment.interpolation = "bicubic"
  config.augment.flip = 0.0
  config.augment.randaugment = ""
  config.augment.color_jitter = 0.0
  config.augment.repeats = 1
  # In the training step, on the device; see vit_jax_ext/training/mixup.py.
  config.augment.mixup = 0.0
  config.augment.cutmix = 0.0
  config.augment.switch_probability = 0.5
  config.augment.mixing_batch = config_dict.placeholder(int)
  config.augment.erasing = 0.0
  config.augment.erase_mixed = False

  config.optimizer = ConfigDict()
  config.optimizer.learning_rate = 1e-3
  config.optimizer.initial_learning_rate = 1e-6
  config.optimizer.final_learning_rate = 1e-5
  config.optimizer.warmup_steps = 0
  config.optimizer.warmup_epochs = 0.0
  config.optimizer.warmup_prefix = True
  config.optimizer.cooldown_epochs = 0.0
  config.optimizer.per_epoch = False
  config.optimizer.epochs_behind = 0
  config.optimizer.weight_decay = 0.05
  config.optimizer.clip_norm = config_dict.placeholder(float)
  config.optimizer.accumulation_steps = 1
  config.optimizer.layer_decay = 1.0
  config.linear_probe = False
  config.label_smoothing = 0.1
  config.cosine_regularizer = ConfigDict()
  config.cosine_regularizer.weight = 0.0  # DeepViT-32b: 0.1
  config.cosine_regularizer.blocks = ()  # DeepViT-32b: 0 to 11
  config.ema_decay = 0.0

  config.skip_nonfinite = False
  config.log_every_steps = 50
  config.eval_every_steps = 1000
  config.checkpoint = ConfigDict()
  config.checkpoint.every_steps = 1000
  config.checkpoint.keep_last = 2
  config.tracker = config_dict.placeholder(str)
  config.compilation_cache = "auto"
  config.mesh = ConfigDict(dict(data=-1, fsdp=1, model=1))

  # --config.smoke=True sets what stands below `when_smoke`: two steps and one evaluation, in seconds on a CPU. What
  # follows it on the command line still counts.
  config.smoke = False
  config.when_smoke = ConfigDict()
  config.when_smoke.batch_size = 8
  config.when_smoke.total_steps = 2
  config.when_smoke.total_epochs = None
  config.when_smoke.log_every_steps = 1
  config.when_smoke.optimizer = ConfigDict(dict(warmup_steps=0, warmup_epochs=0.0, cooldown_epochs=0.0))
  return config


def deit_recipe(model: str, *, batch_size: int) -> ConfigDict:
  """Returns DeiT's recipe for ImageNet-1k, from which those of all families here descend.

  Touvron et al. 2021, Table 9, and the defaults of main.py in facebookresearch/deit; the timm that it runs on.

  Args:
    model: name of the variant.
    batch_size: the authors'. Another one on the command line changes the learning rate with it.
  """
  config = base_config()
  config.model.name = model
  config.model.overrides.drop_path_rate = 0.1  # Table 9: stochastic depth
  config.model.overrides.dtype = "bfloat16"  # mixed precision, there float16
  config.dataset.name = "imagenet2012"
  config.batch_size = batch_size
  config.total_epochs = 300

  config.optimizer.learning_rate = 5e-4 * config.get_ref("batch_size").to_float() / 512
  config.optimizer.initial_learning_rate = 1e-6  # --warmup-lr
  config.optimizer.final_learning_rate = 1e-5  # --min-lr
  config.optimizer.warmup_epochs = 5.0
  config.optimizer.warmup_prefix = False  # timm's cosine
  config.optimizer.per_epoch = True  # timm's scheduler is stepped once per epoch,
  config.optimizer.epochs_behind = 1  # by main.py after epoch e with e, not e + 1
  config.optimizer.weight_decay = 0.05
  config.label_smoothing = 0.1

  config.augment.crop_scale = (0.08, 1.0)  # timm's default
  config.augment.interpolation = "bicubic"
  config.augment.flip = 0.5  # timm's default
  config.augment.randaugment = "rand-m9-mstd0.5-inc1"
  config.augment.color_jitter = 0.0  # their 0.3 or 0.4 is ignored: timm has either RandAugment or colour jitter
  config.augment.repeats = 3  # --repeated-aug
  config.augment.erasing = 0.25
  config.augment.mixup = 0.8
  config.augment.cutmix = 1.0
  config.augment.switch_probability = 0.5

  config.eval_every_steps = 2500
  config.checkpoint.every_steps = 2500
  config.when_smoke.dataset = ConfigDict(dict(name="synthetic", shuffle_buffer=64))
  config.when_smoke.augment = ConfigDict(dict(mixing_batch=4))
  return config


def fine_tune(config: ConfigDict, weights: str | bool) -> None:
  """Turns a recipe into the fine-tuning at a higher resolution that DeiT's README gives (DeiT-B at 384).

  Args:
    config: a recipe, at the higher resolution.
    weights: those of the lower resolution, as config.pretrained names them.
  """
  config.model.overrides.drop_path_rate = 0.0  # nothing is dropped in evaluation mode, in which --finetune trains
  config.pretrained = weights
  config.batch_size = 512  # 2 nodes of 8 GPUs, 32 images each
  config.augment.mixing_batch = 32
  config.total_epochs = 30
  config.optimizer.learning_rate = 5e-6 * config.get_ref("batch_size").to_float() / 512
  config.optimizer.final_learning_rate = 5e-6  # --min-lr
  config.optimizer.weight_decay = 1e-8
  config.when_smoke.pretrained = None
