"""`python -m recipes.tiny`."""

from .command import main

raise SystemExit(main())
