"""The methods: name in the config -> factory(tokenizer, **options) -> `Method`."""

from prefix_tuning.methods import prefix

METHODS = {"prefix": prefix.make}
