#!/usr/bin/env python3
"""Takes each gate of the proof out, in a copy of the tree, and runs the tests
that must then fail. Ends with 1 where one passes. As root; takes long.

    scripts/mutants.py [--list | --table] [NAME ...]

NAME: gates whose name holds it; all without. --table prints docs/TESTING.md's.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile

EPOCH = "src/reader/epoch.rs"
VERIFY = "src/reader/verify.rs"
PROOF = "src/cache/proof.rs"
FACTS = "src/cache/rclone/facts.rs"
METADATA = "src/cache/rclone/metadata.rs"
# A test that hangs has shown nothing.
PATIENCE = 240
UNIT = "lib::cache::proof::tests::each_gate_refuses_by_itself"


class Gate:
    """A gate, its edits `(file, text, instead)`, and the tests that hold it;
    where there are none, `reason` says why."""

    def __init__(self, name, edits, *tests, reason=None):
        self.name, self.edits, self.tests, self.reason = name, edits, tests, reason


LOOK = """        if has_pages()? {
            return by_fuse;
        }
"""
READ = "        self.read_again(buffer, offset)?;\n"
DONE = "        Ok(Outcome::Cache(length))\n"

GATES = [
    Gate("one link after each pread", [(EPOCH, "if stat.st_nlink != 1 {", "if false {")],
         "changes::an_evicted_clip_reads_on", "changes::a_second_link_of_the_cache_file_is_refused"),
    Gate("size after each pread", [(EPOCH, "if stat.st_size as u64 != self.proof.size {", "if false {")],
         "changes::a_cache_file_of_another_size_is_not_read"),
    Gate("SEEK_HOLE", [(EPOCH, "Ok(hole) => Ok(hole as u64 >= end),", "Ok(_) => Ok(end >= start),")],
         "damage::metadata_without_data_is_not_believed", "damage::a_power_loss_leaves_holes",
         "renames::metadata_of_a_dead_item_that_was_alike", "changes::a_hole_under_full_metadata_is_left_to_fuse"),
    Gate("SEEK_HOLE's margin, writable", [(EPOCH, "self.is_present(self.pieces[index], margin)?", "self.is_present(self.pieces[index], margin * 0)?")],
         "writable::a_block_that_is_there_in_part_is_left_to_fuse"),
    Gate("metadata unchanged, each piece", [(EPOCH, "        self.check_metadata()?;\n        let margin", "        let margin")],
         "damage::each_piece_looks_at_the_metadata"),
    Gate("metadata unchanged, each read of a writable mount", [(EPOCH, "if self.proof.writable && !self.lock_metadata()", "if false && !self.lock_metadata()")],
         "writable::every_read_looks_at_the_metadata"),
    Gate("metadata unchanged, once a second", [(EPOCH, "        self.check_metadata()?;\n        if !self.proof.writable {", "        if !self.proof.writable {")],
         "damage::metadata_is_looked_at_once_a_second"),
    Gate("FUSE's view, once a second", [(EPOCH, "Ok(_) => return Err(changed(\"is behind what FUSE shows\")),", "Ok(_) => {}")],
         "changes::a_clip_that_shrinks_at_the_remote_ends_where_fuse_says"),
    Gate("racy metadata is read again", [(METADATA, "        if !self.racy {", "        if !self.racy || true {")],
         "damage::metadata_that_changed_within_one_tick"),
    Gate("metadata is read twice", [(METADATA, "let stable = first == second\n        &&", "let stable =")],
         reason="one read mixes two versions only if the reader is put off within it for all of rclone's truncation and write, in one tick: `damage::metadata_of_two_versions_is_none` tries, and did not meet it"),
    Gate("not dirty", [(PROOF, "if facts.metadata.dirty {", "if false {"), (FACTS, "if metadata.dirty {", "if false {")],
         "changes::dirty_metadata_ends_the_proof"),
    Gate("fingerprint's size", [(PROOF, "if fingerprint.size == facts.fuse_size && modified", "if modified")],
         "changes::metadata_of_another_size_ends_the_proof"),
    Gate("fingerprint's time", [(PROOF, "facts.fuse_size && modified == facts.fuse_modified {", "facts.fuse_size {")],
         "changes::metadata_of_another_version_ends_the_proof", "renames::metadata_of_a_dead_item_is_of_another_version"),
    Gate("metadata's size", [(PROOF, "if metadata == data && data == fuse {", "if data == fuse {")],
         "changes::metadata_of_another_size_ends_the_proof"),
    Gate("FUSE's size", [(PROOF, "if metadata == data && data == fuse {", "if metadata == data {")], UNIT),
    Gate("no other rclone on the cache", [(PROOF, "match &mount.shared_with {", "match &None::<String> {")],
         "changes::two_mounts_on_one_cache_are_refused", "changes::an_rclone_of_another_namespace_on_the_same_cache_is_seen"),
    Gate("a kernel that shows writeback", [(PROOF, "mount.kernel >= WRITEBACK_IS_SEEN", "mount.kernel >= (0, 0)")], UNIT),
    Gate("a file system that tells holes", [(PROOF, "*magic == facts.data_fs", "*magic > 0")], UNIT),
    Gate("one link at the proof", [(PROOF, "(_, 1) => Ok(", "(_, 1..) => Ok(")],
         "changes::a_second_link_of_the_cache_file_is_refused"),
    Gate("rename barrier", [(FACTS, "        trail.failure(Gate::Settled, rename_barrier(clip.path))?;\n", "        let _ = rename_barrier;\n")],
         "renames::a_rename_that_is_under_way"),
    Gate("settled", [(PROOF, "Some(WritableFacts { settled: true, .. })", "Some(WritableFacts { .. })")], UNIT),
    Gate("settled is what was seen", [(FACTS, "settled: again.is_same(&view)", "settled: again.is_same(&view) || true")],
         reason="the second view, taken after the barrier, is the one that is proven, and is whole by itself"),
    Gate("no unwritten page at the proof", [(PROOF, "            unwritten_pages: 0, ..\n        }) => Ok(", "            ..\n        }) => Ok(")], UNIT),
    Gate("no page around each read", [(EPOCH, "companion.has_pages(offset, length as u64);", "companion.has_pages(offset, length as u64).map(|_| false);")],
         "writable::shared_stores_are_seen_before_they_are_flushed", "writable::what_a_write_back_cache_holds_is_seen",
         "attack::a_write_on_its_way_is_seen_as_fuse_shows_it", "attack::a_failed_write_back_stays_in_the_page_cache"),
    Gate("no page before each read", [(EPOCH, LOOK + READ, READ)],
         reason="a page that is there still after the read is seen then; it counts where the kernel drops it between the pread and the last look"),
    Gate("no page after each read", [(EPOCH, LOOK + DONE, DONE)],
         reason="a page that comes after the first look comes during the read, which may return either"),
    Gate("edges of ranges, writable", [(PROOF, "listed.inner(facts.data_block)", "listed.clone()")],
         "writable::a_read_only_bind_of_a_writable_mount_is_writable", "lib::cache::proof::tests::good_facts_prove_the_ranges"),
    Gate("data before metadata", [
        (FACTS, "        let opened = open_data(clip.located, clip.inside);\n", "        let metadata_path = clip.located.folders.metadata_path(clip.inside);\n        let metadata = read_metadata(&metadata_path);\n        let opened = open_data(clip.located, clip.inside);\n"),
        (FACTS, "        let metadata_path = clip.located.folders.metadata_path(clip.inside);\n        let metadata = read_metadata(&metadata_path)\n            .and_then", "        let metadata = metadata\n            .and_then")],
         reason="the prime has made rclone create the file before either; one that is created between them is empty, which SEEK_HOLE sees"),
    Gate("the path leads to the open file", [(FACTS, "if file.is(&fuse) {", "if file.is(&fuse) || true {")],
         "renames::a_deleted_clip_is_not_the_one_that_is_named_deleted"),
    Gate("the daemon holds the file", [(FACTS, 'Ok(Held::None) => refuse(Reason::NoCacheFile, "does not have open"),', "Ok(Held::None) => open_read_only(&path).map(|file| (file, true)).map_err(|e| Refusal::from_io(\"\", &e, Reason::IoError)),")],
         "damage::a_cache_that_is_not_used_any_more_is_not_read"),
    Gate("the daemon's file is not deleted", [(FACTS, "            return Ok(Held::Deleted);", "            continue;")],
         "damage::a_reset_leaves_an_empty_file_under_full_metadata"),
    Gate("one file of the name", [(FACTS, "Some((_, first)) if *first != own => return Ok(Held::Several),", "Some((_, first)) if *first != own => {}")],
         reason="two linked files of one path come while the descriptors are listed, if at all: no test makes that happen"),
    Gate("cache mode, where descriptors are hidden", [(FACTS, "if !located.cache_mode_full {", "if false {")],
         "damage::a_cache_that_is_not_used_any_more_is_not_read"),
    Gate("prime", [("src/reader/companion.rs", "let read = read_at(&file, &mut [0], offset);", "let read = Ok::<_, io::Error>(1 + 0 * offset);")],
         "changes::a_rewritten_metadata_file_costs_no_fuse_read"),
    Gate("no read-ahead, writable", [("src/reader.rs", "State::Active(epoch) => !epoch.is_writable(),", "State::Active(_) => true,")],
         "writable::small_sequential_reads_see_each_write"),
    Gate("read-ahead ends with its proof", [("src/reader/buffer.rs", "if self.generation != file.generation.load(Ordering::Acquire) {", "if false {")],
         "changes::what_was_read_ahead_does_not_outlive_its_proof"),
    Gate("margin of pulled ranges", [
        (EPOCH, "p.find(offset, self.proof.block)", "p.find(offset, 1)"),
        (EPOCH, "self.is_present(Span { start: offset, end }, self.proof.block)?", "self.is_present(Span { start: offset, end }, 0)?")],
         "damage::a_pulled_range_is_looked_at_for_holes"),
    Gate("holes in pulled ranges", [(EPOCH, "if !self.is_present(Span { start: offset, end }, self.proof.block)? {", "if false {")],
         "damage::a_pulled_range_is_looked_at_for_holes"),
    Gate("quarantine", [(VERIFY, "            if files.contains(file) {\n                return", "            if false {\n                return")],
         "difference::a_difference_is_told_and_ends_the_bypass", "quarantine::a_quarantined_clip_is_quarantined_by_each_path"),
    Gate("breaker", [(VERIFY, "const BREAKER: usize = 2;", "const BREAKER: usize = 3;")],
         "breaker::two_files_that_differ_end_every_bypass"),
    Gate("compared with rclone itself, writable", [(VERIFY, "Some(file) => companion::read_at(file, rest, at)?,", "Some(_) => companion.read_at(rest, at)?,")],
         reason="a store that has not reached rclone is in the kernel's pages, which end the comparison of a read that began before it; what `attack::a_store_while_verifying_is_no_alarm` tries"),
    Gate("what was pulled is in the cache", [("src/reader/prove.rs", "located.says_it_caches_reads()", "true")],
         reason="what was pulled is in the kernel's pages, which are FUSE's on a writable mount; before they were, `attack::what_is_pulled_past_the_cache_is_not_in_it` failed"),
    Gate("still read-only, once a second", [("src/reader/prove.rs", "m.dev == dev && !m.read_only", "m.dev == dev && false")],
         "attack::a_superblock_made_writable_under_a_proof"),
    Gate("age of what was read ahead", [("src/reader/buffer.rs", "const MAX_AGE_MS: u64 = 20;", "const MAX_AGE_MS: u64 = 20_000;")],
         "attack::a_buffered_read_is_not_behind_fuse"),
    Gate("nothing changed at a difference", [(VERIFY, "            epoch.check_now(companion)?;\n", "")],
         reason="the second read looks at links, size and, on a writable mount, metadata by itself"),
]


def cargo(tree, target, *arguments):
    """Exit code and output; None after PATIENCE."""
    command = ["cargo", "test", "--locked", "--no-default-features", *arguments]
    child = subprocess.Popen(command, cwd=tree, text=True, start_new_session=True,
                             env={**os.environ, "CARGO_TARGET_DIR": target, "RUST_BACKTRACE": "0"},
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        output, _ = child.communicate(timeout=PATIENCE)
        return child.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGINT)
        child.communicate()
        return None, ""


def where(test):
    binary, _, name = test.partition("::")
    return (["--lib"] if binary == "lib" else ["--test", binary]), name


def build(tree, target, tests):
    binaries = sorted({tuple(where(test)[0]) for test in tests})
    code, output = cargo(tree, target, *sum(binaries, ()), "--no-run")
    if code != 0:
        sys.exit(f"mutants: does not build:\n{output}")


def passes(tree, target, test):
    """Whether it passes, None where it did not run to its end; and what it
    failed by: a reader has to see that it was the gate."""
    binary, name = where(test)
    code, output = cargo(tree, target, *binary, "--", "--exact", name)
    if code is not None and "running 1 test\n" not in output:
        sys.exit(f"mutants: there is no test {test}")
    lines = output.splitlines()
    panics = [i for i, line in enumerate(lines) if " panicked at " in line]
    why = " ".join(lines[panics[0]:panics[0] + 2]).split(" panicked at ")[1] if panics else ""
    return (None if code is None else code == 0), why[:200]


def read(path):
    with open(path) as source:
        return source.read()


def write(path, content):
    with open(path, "w") as source:
        source.write(content)


def table():
    print("| gate | without it fails |\n| --- | --- |")
    for gate in GATES:
        tests = ", ".join(f"`{test}`" for test in gate.tests)
        print(f"| {gate.name} | {tests or 'none: ' + gate.reason} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the gates")
    parser.add_argument("--table", action="store_true", help="print the table of docs/TESTING.md")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    if options.table:
        return table()
    gates = [g for g in GATES if not options.names or any(n in g.name for n in options.names)]
    if options.list:
        return print("\n".join(gate.name for gate in gates))
    root = subprocess.check_output(["git", "rev-parse", "--show-toplevel"], text=True,
                                   cwd=os.path.dirname(os.path.abspath(__file__))).strip()
    target = os.path.abspath(os.path.join(root, os.environ.get("CARGO_TARGET_DIR", "target"), "mutants"))
    failed = 0
    with tempfile.TemporaryDirectory(prefix="vmafx-mutants-") as tree:
        for name in subprocess.check_output(["git", "ls-files"], text=True, cwd=root).splitlines():
            copy = os.path.join(tree, name)
            os.makedirs(os.path.dirname(copy), exist_ok=True)
            shutil.copyfile(os.path.join(root, name), copy)
        for gate in gates:
            for file, text, _ in gate.edits:
                count = read(os.path.join(tree, file)).count(text)
                if count != 1:
                    sys.exit(f"mutants: {gate.name}: its text is {count} times in {file}")
        tests = sorted({test for gate in gates for test in gate.tests})
        build(tree, target, tests)
        for test in tests:
            passed, why = passes(tree, target, test)
            if not passed:
                sys.exit(f"mutants: {test} fails as it is: {why}")
        print(f"{len(tests)} tests pass as it is", flush=True)
        for gate in gates:
            originals = {file: read(os.path.join(tree, file)) for file, _, _ in gate.edits}
            for file, text, instead in gate.edits:
                path = os.path.join(tree, file)
                write(path, read(path).replace(text, instead))
            build(tree, target, gate.tests or ["lib::"])
            if not gate.tests:
                print(f"none    {gate.name}: {gate.reason}", flush=True)
            for test in gate.tests:
                passed, why = passes(tree, target, test)
                # A test that hung has failed, too, but shows nothing.
                word = {True: "PASSED", False: "failed", None: "HUNG"}[passed]
                failed += passed is not False
                print(f"{word:7} {gate.name}: {test}: {why}", flush=True)
            for file, content in originals.items():
                write(os.path.join(tree, file), content)
    shown = sum(bool(gate.tests) for gate in gates)
    print(f"{shown} gates with tests, {len(gates) - shown} without; {failed} tests did not fail")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
