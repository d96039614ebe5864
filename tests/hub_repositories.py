"""What a hub stores: repositories of commits, branches and tags, and the content of their files."""

import hashlib
from dataclasses import dataclass, field


@dataclass(frozen=True)
class File:
    """A file of a commit; the oid is the content's sha256 in LFS, else git's."""

    oid: str
    size: int
    lfs: bool


@dataclass(frozen=True)
class Commit:
    title: str
    parent: str | None
    files: dict[str, File]


@dataclass
class Repository:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def find(self, revision: str) -> str | None:
        """The commit of a branch, a tag or a commit's own name."""
        names = self.branches | self.tags | {name: name for name in self.commits}
        return names.get(revision.removeprefix("refs/heads/"))


class Repositories:
    """All repositories of a hub."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        """By models/ORG/NAME or datasets/ORG/NAME."""
        self.contents: dict[str, bytes] = {}
        """By oid."""

    def repository(self, name: str, kind: str = "models") -> Repository:
        return self.repositories[f"{kind}/{name}"]

    def files(self, name: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """The content of each file of a revision."""
        repository = self.repository(name, kind)
        commit = repository.find(revision)
        assert commit is not None, f"{name} has no revision {revision}"
        return {path: self.contents[file.oid] for path, file in repository.commits[commit].files.items()}

    def titles(self, name: str, branch: str = "main", kind: str = "models") -> list[str]:
        """The commits of a branch, oldest first."""
        repository, found = self.repository(name, kind), []
        at: str | None = repository.branches[branch]
        while at is not None:
            found.append(repository.commits[at].title)
            at = repository.commits[at].parent
        return found[::-1]

    def store(self, content: bytes, *, lfs: bool) -> str:
        header = b"" if lfs else b"blob %d\0" % len(content)
        oid = (hashlib.sha256 if lfs else hashlib.sha1)(header + content).hexdigest()
        self.contents[oid] = content
        return oid

    def commit(self, repository: Repository, branch: str, title: str, files: dict[str, File]) -> str:
        parent = repository.branches.get(branch)
        name = hashlib.sha1(
            f"{id(repository)} {branch} {title} {parent} {len(repository.commits)}".encode()
        ).hexdigest()
        repository.commits[name] = Commit(title, parent, files)
        repository.branches[branch] = name
        return name
