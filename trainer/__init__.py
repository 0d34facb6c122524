"""The bundled trainer: config -> data -> loop -> artifacts. It imports neither `launcher` nor `infra`."""
