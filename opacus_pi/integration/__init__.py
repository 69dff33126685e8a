"""The parts of ``PrivacyEngine``: what it watches, records, refuses and resumes."""

__all__: list[str] = []
