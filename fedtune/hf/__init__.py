"""Facts about transformers models that the rooms which load, train and split them share. No federation in
here."""
