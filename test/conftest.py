"""Shape and type checks of core while tests run; on the vehicle its annotations cost nothing."""

from jaxtyping import install_import_hook

install_import_hook('mose_ros.core', 'beartype.beartype')
