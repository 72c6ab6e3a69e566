"""Weights on the Hugging Face Hub: hf://OWNER/NAME[@REVISION][/FILE], by huggingface_hub and into its cache; and back.

Its environment counts: HF_TOKEN, HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT.
"""

import functools
import hashlib
import pathlib
import re

from vit_jax_ext.errors import UserError

PREFIX = "hf://"
FILES = ("model.safetensors", "pytorch_model.bin")  # where a repository keeps its weights, the first that there is
_ADDRESS = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<file>[\w./-]+))?")


def in_folder(folder: pathlib.Path) -> pathlib.Path | None:
  """Returns the weights in a downloaded repository; None if the folder is none."""
  return next((folder / name for name in FILES if (folder / name).is_file()), None)


def fetch(address: str) -> pathlib.Path:
  """Returns the local copy of a repository's weights; downloads it once, and goes on where that was cut off.

  Raises:
    UserError: no such address, repository, revision or file, one that is gated, no network, or other content than the
      Hub has recorded.
  """
  match = _ADDRESS.fullmatch(address)
  if not match or ".." in address:
    raise UserError(f"{address} is no address on the Hub; write hf://OWNER/NAME, hf://OWNER/NAME@REVISION or "
                    "hf://OWNER/NAME/FILE")  # fmt: skip
  import huggingface_hub
  from huggingface_hub import errors

  huggingface_hub.logging.set_verbosity_error()  # what it tries again is in its own bar, or in our line
  repository, revision, file = match["repository"], match["revision"], match["file"]
  at = f"{repository}{f' at {revision}' if revision else ''}"
  names = [file] if file else FILES
  for name in names:
    page = f"https://huggingface.co/{repository}/resolve/{revision or 'main'}/{name}"
    try:
      return _checked(pathlib.Path(huggingface_hub.hf_hub_download(repository, name, revision=revision)), address)
    except errors.GatedRepoError:
      raise UserError(f"{address}: {repository} is gated; accept its terms on https://huggingface.co/{repository} and "
                      "give your token, HF_TOKEN=... or hf auth login") from None  # fmt: skip
    except errors.RepositoryNotFoundError:
      raise UserError(f"{address}: there is no repository {repository}, or it is private; check the name, or give your "
                      "token, HF_TOKEN=... or hf auth login") from None  # fmt: skip
    except errors.RevisionNotFoundError:
      raise UserError(f"{address}: {repository} has no revision {revision}; see "
                      f"https://huggingface.co/{repository}/commits/main") from None  # fmt: skip
    except errors.LocalEntryNotFoundError:
      raise UserError(f"{address}: the Hub cannot be reached, and the file is not in its cache; download {page} where "
                      "that works, and give the file's path instead") from None  # fmt: skip
    except errors.EntryNotFoundError:
      continue
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
      why = " ".join(str(error).split())[:120]
      raise UserError(f"{address} cannot be downloaded ({why}); start again, or download {page} and give the file's "
                      "path instead") from None  # fmt: skip
  raise UserError(f"{address}: {at} has no {' and no '.join(names)}; name the file, hf://{repository}/FILE")


def _checked(path: pathlib.Path, address: str) -> pathlib.Path:
  """Returns the path of a file in the cache, a link to what is named by the SHA-256 that the Hub has recorded of it."""
  expected = path.readlink().name if path.is_symlink() else ""
  if re.fullmatch("[0-9a-f]{64}", expected):  # small files have Git's own digest
    digest = _digest(path, path.stat().st_mtime_ns)
    if digest != expected:
      path.resolve().unlink()
      path.unlink()
      raise UserError(
        f"{address} has the SHA-256 {digest[:16]}... instead of {expected[:16]}..., which the Hub has recorded; it was "
        "deleted: start again"
      )
  return path


@functools.lru_cache(maxsize=8)  # a command asks for the weights' description, and then for the weights
def _digest(path: pathlib.Path, changed: int) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def check_name(repository: str) -> None:
  """Raises UserError unless a repository may be called so."""
  if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository):
    raise UserError(f"{repository} is no repository on the Hub; write OWNER/NAME")


def upload(folder: pathlib.Path, repository: str) -> str:
  """Creates a repository if there is none, uploads the files of a folder in one commit, and returns its address.

  Args:
    folder: of files alone.
    repository: see `check_name`.

  Raises:
    UserError: it has files of these names, you may not write there, or there is no network.
  """
  import huggingface_hub
  from huggingface_hub import errors

  api = huggingface_hub.HfApi()
  try:
    address = api.create_repo(repository, exist_ok=True)
    if taken := {path.name for path in folder.iterdir()} & set(api.list_repo_files(repository)):
      raise UserError(
        f"{repository} has {', '.join(sorted(taken))}, which would be overwritten; delete what is there, or choose "
        "another name"
      )
    api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Weights, config and card")
  except UserError:
    raise
  except Exception as error:  # the library's, those of two clients beneath it, and of the system
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.LocalTokenNotFoundError) or status in (401, 403):
      raise UserError(
        f"you may not write to {repository}; check the owner's name, and give a token that can write, HF_TOKEN=... or "
        "hf auth login"
      ) from None
    why = " ".join(str(error).split())[:120]
    raise UserError(f"{repository} cannot be uploaded ({type(error).__name__}: {why}); start again") from None
  return str(address)
