"""`python -m whence`."""

from whence.cli import main

raise SystemExit(main())
