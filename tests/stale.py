"Which outputs of a page come from the ledger or from results/, and which of them are not what the page gives now."
import ast
import re
import symtable

READS = re.compile(r"\bledger\(\)|results/|metrics\.jsonl")
TRAINS = re.compile(r"\btraining\.(start|epochs)\(")  # its digits depend on the processor


def bound_and_used(source):
    "Names that a cell binds at its top level, and names that it reads before it has bound them."
    lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
    bound, used = set(), set()
    for statement in ast.parse("\n".join(lines)).body:
        top = symtable.symtable(ast.unparse(statement), "cell", "exec")
        here = {s.get_name() for s in top.get_symbols() if s.is_referenced()} | set(read_inside(top))
        bound |= {name.id for target in targets(statement) for name in ast.walk(target) if isinstance(name, ast.Name)}
        used |= here - bound
        bound |= {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
    return bound, used


def targets(statement):
    "What a `with` or a `for` binds before its body runs."
    if isinstance(statement, ast.With): return [i.optional_vars for i in statement.items if i.optional_vars]
    return [statement.target] if isinstance(statement, ast.For) else []


def read_inside(table):
    "Names of the page that functions and comprehensions in a cell read."
    for child in table.get_children():
        yield from (s.get_name() for s in child.get_symbols() if s.is_global() and s.is_referenced())
        yield from read_inside(child)


def read_from_files(cells):
    "Numbers of the code cells that read the ledger or results/, or use what such a cell has bound (not by training)."
    known, out = set(), []
    for n, cell in enumerate(cells):
        bound, used = bound_and_used(cell.source)
        reads = READS.search(cell.source) and not cell.source.startswith("#| export")
        if reads or (used & known and not TRAINS.search(cell.source)):
            out.append(n)
            known |= bound
        else:
            known -= bound
    return out


def text(cell):
    "What a cell prints and shows, as text: pictures and the random ids of styled tables left out."
    parts = []
    for o in cell.get("outputs", []):
        if o.get("name") == "stderr": continue  # warnings of libraries
        data = o.get("data", {})
        parts.append(o.get("text") or data.get("text/markdown") or data.get("text/html") or data.get("text/plain") or "")
    joined = "".join(map("".join, parts))
    return re.sub(r"T_[0-9a-f]{5}", "T", re.sub(r"<Figure size [^>]*>", "", joined)).strip()


def stale_cells(stored, fresh):
    "Cells of a page (lists of code cells, stored and executed now) whose stored text is not what they give now."
    return [n for n in read_from_files(stored) if text(stored[n]) != text(fresh[n])]
