"""Sources of images: one file per layout, each with `open_source(config) -> Source`.

To add one:

1. Write a file like image_folder.py: `open_source(config: SourceConfig) -> Source` lists the images and reads the
   labels, and decodes nothing. Splits are `Images` (random access) or lists of `ImageStream` (read from the start);
   base.py has both, and classes for images in memory and in files. If something is missing, raise ValueError, one
   sentence that names `source.path`.
2. Add an entry to SOURCES in registry.py. `--help`, the check of `source.kind` and the messages use it.

For a new option, add a field to SourceConfig (data_prep/config.py), and list it in `options` of the entry; other
kinds then reject it.
"""
