"""Public names of the package, each with the module that defines it: read by type checkers and by `_lazy.py`."""

from hf_adafocal.data.columns import label_column as label_column
from hf_adafocal.data.encoding import encode_images as encode_images
from hf_adafocal.data.encoding import encode_texts as encode_texts
from hf_adafocal.data.fingerprint import fingerprint as fingerprint
from hf_adafocal.data.holdout import hold_out as hold_out
from hf_adafocal.data.images import to_rgb as to_rgb
from hf_adafocal.data.loading import Splits as Splits
from hf_adafocal.data.loading import load_splits as load_splits
from hf_adafocal.data.overlap import check_splits as check_splits
from hf_adafocal.data.overlap import drop_overlap as drop_overlap
from hf_adafocal.data.overlap import without_overlap as without_overlap
from hf_adafocal.data.tensor_rows import ImageRows as ImageRows
from hf_adafocal.data.tensor_rows import TensorRows as TensorRows
from hf_adafocal.data.tensor_rows import stack_images as stack_images
from hf_adafocal.data.tensor_rows import whole_batch as whole_batch
