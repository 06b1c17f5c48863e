"""timm's own modules for the tests, also where its torchvision cannot be had."""

from tests.torchvision_stand_in import imported

timm = imported("timm")
