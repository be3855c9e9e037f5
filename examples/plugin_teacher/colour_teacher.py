"""A teacher in a package of its own: the mean colour of each cell of a 16 × 16 grid."""

from PIL import Image

from olapipe.teachers.base import COMMON_OPTIONS, Teacher, resolve_options
from olapipe.teachers.info import TeacherInfo
from olapipe.teachers.pixels import OURS, OwnPreprocessor, own_arguments
from olaschema.manifest import Fingerprint

INFO = TeacherInfo(
    name="colour", published="colour-1", licence="CC0-1.0", about="Mean colour of each cell",
    grid=(16, 16), channels=3, module="colour_teacher", options=COMMON_OPTIONS,
)  # fmt: skip


def load(info, settings):
    """Return the teacher; one with weights would read them from `settings.checkpoint` here."""
    options = resolve_options(info.name, info.options, settings)
    arguments = own_arguments(64, resample=Image.Resampling.BILINEAR, mean=0.0, std=1.0)
    pixels = OwnPreprocessor("", OURS, arguments, None, str(options["channel_order"]), bool(options["exif"]))
    meaning = Fingerprint(
        teacher=info.name, model_class="Colour", weights="", preset=settings.preset, preprocessing=pixels.record,
        taps=(), pooling="none", grid=info.grid, channels=info.channels,
    )  # fmt: skip
    return Colour(name=info.name, licence=info.licence, source="colour-1", preprocessor=pixels, fingerprint=meaning)


class Colour(Teacher):
    """Means over cells of 4 × 4 pixels, `(B, 16, 16, 3)`."""

    def encode(self, pixels_bchw):
        """Average the pixels of each cell."""
        return pixels_bchw.reshape(-1, 3, 16, 4, 16, 4).mean((3, 5)).permute(0, 2, 3, 1).contiguous()
