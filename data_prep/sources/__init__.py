"""Where images come from: one file a layout, each with `open_source(config) -> Source`.

To add one:

1. Write a file like image_folder.py: `open_source(config: SourceConfig) -> Source` lists the images and reads the
   labels, and decodes nothing. Splits are `Images` (read in any order) or lists of `ImageStream` (read from the
   beginning); base.py has both, and classes for images in memory and in files. Raise ValueError, one sentence that
   names `source.path`, for what is missing.
2. Add a line to SOURCES in registry.py. `--help`, the check of `source.kind` and the messages follow from it.

An option that no source has yet is a field of SourceConfig (data_prep/config.py) as well; the line names it in
`options`, and other kinds refuse it.
"""
