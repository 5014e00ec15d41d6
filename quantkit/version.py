"""The version of the package, and of the artefacts it leaves."""

VERSION = "0.1.0"
