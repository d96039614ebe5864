"""decode.py decodes image files to pixels; crops.py crops and resizes them to the views that are stored."""
