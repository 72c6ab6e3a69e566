"""What the experiment families share."""

from ml_collections import ConfigDict, config_dict


def base_config() -> ConfigDict:
  """Returns a config with every key that the trainer reads; families fill in their choices."""
  config = ConfigDict()
  config.seed = 0
  config.batch_size = 1024  # global: over all devices of all hosts
  # How long: one of the two.
  config.total_steps = config_dict.placeholder(int)
  config.total_epochs = config_dict.placeholder(float)

  config.model = ConfigDict()
  config.model.name = ""
  config.model.overrides = ConfigDict()  # keyword arguments of vit_jax_ext.create_model
  # Where the weights come from: a file, a run's workdir, True for the published ones; None for random weights.
  config.pretrained = config_dict.placeholder(object)

  config.dataset = ConfigDict()
  config.dataset.name = ""
  config.dataset.data_dir = config_dict.placeholder(str)  # None: TFDS's default, ~/tensorflow_datasets
  config.dataset.train_split = "train"
  config.dataset.eval_split = "validation"
  config.dataset.shuffle_buffer = 50_000
  config.dataset.crop = config_dict.placeholder(float)  # evaluation's centre crop; None: the variant's
  config.dataset.shift = 0.0  # augmentation: largest displacement, share of a side
  config.dataset.scale = 0.0  # augmentation: largest change of size

  # Augmentation in the training step, on the device; see vit_jax_ext/training/mixup.py.
  config.augment = ConfigDict()
  config.augment.mixup = 0.0  # alpha of its Beta distribution; 0: off
  config.augment.cutmix = 0.0  # likewise
  config.augment.switch_probability = 0.5  # of cutmix instead of mixup, where both are on
  config.augment.mixing_batch = config_dict.placeholder(int)  # images of one draw; None: the whole batch
  config.augment.erasing = 0.0  # probability of random erasing
  config.augment.erase_mixed = False  # erase after mixing, not before

  config.optimizer = ConfigDict()
  config.optimizer.learning_rate = 1e-3  # peak
  config.optimizer.initial_learning_rate = 1e-6
  config.optimizer.final_learning_rate = 1e-5
  config.optimizer.warmup_steps = 0
  config.optimizer.weight_decay = 0.05
  config.optimizer.clip_norm = config_dict.placeholder(float)
  config.optimizer.accumulation_steps = 1
  config.optimizer.layer_decay = 1.0  # factor of the learning rate from each layer to the one before
  config.linear_probe = False  # train the classifier alone
  config.label_smoothing = 0.1
  config.cosine_regularizer = ConfigDict()
  config.cosine_regularizer.weight = 0.0  # of the similarity of neighbouring blocks' attention maps (DeepViT-32b: 0.1)
  config.cosine_regularizer.blocks = ()  # block i is compared with i + 1 (DeepViT-32b: 0 to 11)
  config.ema_decay = 0.0  # 0: no averaged weights

  config.log_every_steps = 50
  config.eval_every_steps = 1000
  config.checkpoint = ConfigDict()
  config.checkpoint.every_steps = 1000  # besides one at every evaluation
  config.checkpoint.keep_last = 2  # besides the best
  config.mesh = ConfigDict(dict(data=-1, fsdp=1, model=1))
  return config
