//! What can be a test is not a review remark: the layout keeps showing the truth.
//!
//! Reads the sources as text. A rule that is in the way is changed here, with its reason.

use std::fs;
use std::path::{Path, PathBuf};

const FILE_LINES_MAX: usize = 600;
const FUNCTION_LINES_MAX: usize = 70;

/// The only places that know the runtime they run on.
const GLOMMIO: &[&str] = &[
    "bench/",
    "engine/src/disk/direct.rs",
    "engine/src/node/executor.rs",
    "frontends/examples/",
    "frontends/src/aoe/socket.rs",
    "frontends/src/bin/",
    "frontends/src/nbd/connection.rs",
    "frontends/src/nbd/listener.rs",
    "frontends/src/nbd/reception.rs",
    "frontends/src/nbd/server.rs",
    "frontends/src/nbd/stream.rs",
    "frontends/tests/",
    "rpc/src/client.rs",
    "rpc/src/runtime/glommio.rs",
    "rpc/src/send.rs",
    "rpc/src/server.rs",
    "rpc/tests/",
];
const TOKIO: &[&str] = &[
    "engine/src/control.rs",
    "engine/src/node/",
    "rpc/src/control/client.rs",
    "rpc/src/http.rs",
    "rpc/src/metadata/e",
    "rpc/src/metadata/remote.rs",
    "rpc/tests/",
    "tests/",
];
const ETCD: &[&str] = &["rpc/src/metadata/etcd.rs", "rpc/tests/"];
/// A state is awaited, never a time; this one file polls, with a deadline.
const SLEEPING_TESTS: &[&str] = &["tests/src/wait.rs", "tests/tests/tidy.rs"];

struct Source {
    /// From the repository's root.
    path: String,
    text: String,
}

impl Source {
    fn is_in(&self, places: &[&str]) -> bool {
        places.iter().any(|place| self.path.starts_with(place))
    }

    /// Line number and text of every line with code on it: comments may speak of anything.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text.lines().enumerate().map(|(index, line)| (index + 1, line)).filter(|(_, line)| {
            let line = line.trim_start();
            !line.is_empty() && !line.starts_with("//")
        })
    }

    fn lines_with<'a>(&'a self, word: &'a str) -> impl Iterator<Item = String> + 'a {
        self.code().filter(move |(_, line)| line.contains(word)).map(|(number, _)| format!("{}:{number}", self.path))
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests are a folder of the repository").to_path_buf()
}

fn collect(folder: &Path, wanted: &dyn Fn(&Path) -> bool, found: &mut Vec<Source>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            if !matches!(name.as_str(), "target" | ".git" | "run" | "out" | "vendor") {
                collect(&path, wanted, found);
            }
        } else if wanted(&path) {
            let relative = path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
            found.push(Source { path: relative, text: fs::read_to_string(&path).unwrap_or_default() });
        }
    }
}

fn sources(wanted: &dyn Fn(&Path) -> bool) -> Vec<Source> {
    let mut found = Vec::new();
    collect(&root(), wanted, &mut found);
    found.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(found.len() > 10, "only {} files found under {}", found.len(), root().display());
    found
}

fn rust() -> Vec<Source> {
    sources(&|path| path.extension().is_some_and(|extension| extension == "rs"))
}

fn assert_none(what: &str, offenders: impl IntoIterator<Item = String>) {
    let offenders: Vec<String> = offenders.into_iter().collect();
    assert!(offenders.is_empty(), "{what}:\n  {}", offenders.join("\n  "));
}

/// Lines that use `word`, in files outside `places`.
fn outside(places: &[&str], word: &str) -> Vec<String> {
    let sources = rust();
    let elsewhere = sources.iter().filter(|source| !source.is_in(places) && source.path != "tests/tests/tidy.rs");
    elsewhere.flat_map(|source| source.lines_with(word)).collect()
}

#[test]
fn no_file_is_longer_than_can_be_kept_in_mind() {
    let long = |source: &Source| {
        let lines = source.text.lines().count();
        (lines > FILE_LINES_MAX).then(|| format!("{}: {lines} lines, at most {FILE_LINES_MAX}", source.path))
    };
    assert_none("split these by control flow", rust().iter().filter_map(long));
}

/// (first line, lines) of each function, found by the indentation that rustfmt gives its braces.
fn functions(source: &Source) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    let mut open: Option<(usize, usize)> = None;
    for (index, line) in source.text.lines().enumerate() {
        let indent = line.len() - line.trim_start().len();
        let is_start =
            ["fn ", "pub fn ", "async fn ", "pub async fn ", "pub(crate) fn ", "pub(super) fn ", "const fn "]
                .iter()
                .any(|start| line.trim_start().starts_with(start));
        match open {
            None if is_start && !line.ends_with(';') && !line.ends_with('}') => open = Some((index, indent)),
            Some((start, at)) if indent == at && (line.trim() == "}" || line.trim_end().ends_with(");")) => {
                found.push((start + 1, index - start + 1));
                open = None;
            }
            _ => {}
        }
    }
    found
}

#[test]
fn no_function_is_longer_than_a_screen() {
    let mut long = Vec::new();
    for source in rust() {
        for (line, lines) in functions(&source) {
            if lines > FUNCTION_LINES_MAX {
                long.push(format!("{}:{line}: {lines} lines, at most {FUNCTION_LINES_MAX}", source.path));
            }
        }
    }
    assert_none("move decisions to the parent and work to leaves", long);
}

#[test]
fn every_file_says_what_it_is_for() {
    let silent = |source: &Source| (!source.text.starts_with("//!")).then(|| source.path.clone());
    assert_none("begin these with a //! comment that says their purpose", rust().iter().filter_map(silent));
}

#[test]
fn glommio_stays_in_the_files_that_do_io() {
    assert_none("use the seams of torus_rpc::runtime here", outside(GLOMMIO, "glommio::net"));
    let bare = outside(GLOMMIO, "glommio::").into_iter();
    // `torus_rpc::runtime::glommio` is our own, and what programs start executors with.
    let sources = rust();
    let is_ours = |place: &String| {
        let (path, line) = place.rsplit_once(':').expect("a place is path:line");
        let source = sources.iter().find(|source| source.path == path).expect("the place comes from these sources");
        let line: usize = line.parse().expect("a line number");
        source.text.lines().nth(line - 1).is_some_and(|line| line.contains("runtime::glommio"))
    };
    assert_none("use the seams of torus_rpc::runtime here", bare.filter(|place| !is_ours(place)));
}

#[test]
fn tokio_stays_beside_the_metadata_store_and_the_control_port() {
    assert_none("the data path does not run on tokio", outside(TOKIO, "tokio::"));
}

#[test]
fn the_etcd_client_stays_behind_its_one_file() {
    assert_none("go through torus_rpc::metadata", outside(ETCD, "etcd_client"));
}

#[test]
fn engine_and_frontends_do_not_know_each_other() {
    // A storage node repairs volumes as a client that serves nobody, and serves them as one that lives in it.
    const CLIENTS: [&str; 2] = ["engine/src/node/repairing.rs", "engine/src/node/serving"];
    let crossing = |folder: &str, other: &str| {
        let sources = rust();
        let inside = sources.iter().filter(|source| source.path.starts_with(folder) && !source.is_in(&CLIENTS));
        inside.flat_map(|source| source.lines_with(other)).collect::<Vec<_>>()
    };
    assert_none("the engine knows no frontend", crossing("engine/src/", "torus_frontends"));
    assert_none("frontends know the engine only by its protocol", crossing("frontends/src/", "torus_engine"));
}

#[test]
fn nothing_is_left_for_later_in_the_code() {
    for word in ["todo!(", "unimplemented!(", "allow(dead_code)", "dbg!("] {
        assert_none(&format!("found {word}"), outside(&[], word));
    }
}

#[test]
fn libraries_and_servers_do_not_print() {
    let programs = ["frontends/src/bin/", "frontends/src/admin/", "bench/", "schema/build.rs"];
    // What a test or an example found is for whoever started it.
    let tests = ["tests/", "engine/tests/", "engine/examples/", "engine/src/shard/tests/", "frontends/tests/"];
    let printers = &[programs.as_slice(), &tests].concat();
    for word in ["println!(", "eprintln!("] {
        assert_none(&format!("{word} outside the command line; log with tracing"), outside(printers, word));
    }
}

#[test]
fn tests_await_a_state_and_never_sleep() {
    let sources = rust();
    let tests = sources.iter().filter(|source| source.path.contains("tests/") && !source.is_in(SLEEPING_TESTS));
    let sleeps = tests.flat_map(|source| source.lines_with("thread::sleep").collect::<Vec<_>>());
    assert_none("await an observed state, with a deadline (tests/src/wait.rs)", sleeps);
}

/// What a mutant replaces stands in its file exactly once; whoever changes such lines changes the mutant too.
#[test]
fn mutants_fit_the_code() {
    let mutants = sources(&|path: &Path| path.extension().is_some_and(|extension| extension == "mutant"));
    assert!(mutants.len() > 30, "{} mutants found", mutants.len());
    let unfit = |mutant: &Source| {
        let parts = format!("\n{}", mutant.text);
        let mut unfit = Vec::new();
        for part in parts.split("\n=== ").skip(1) {
            let (file, edit) = part.split_once("\n--- replace\n").expect("a file, then what is replaced");
            let (old, _) = edit.split_once("\n--- by").expect("what is replaced, then by what");
            let text = fs::read_to_string(root().join(file)).unwrap_or_default();
            match text.matches(old).count() {
                1 => {}
                count => unfit.push(format!("{}: in {file} {count} times, expected once", mutant.path)),
            }
        }
        unfit
    };
    assert_none("lines a mutant replaces", mutants.iter().flat_map(unfit));
}

/// What the tables of tests/README.md name, as proof of something, exists: tests, files of tests, mutants.
/// On every Debian machine, or part of a package that is asked for by another of its commands.
const COMES_WITH: &[&str] =
    &["cmp", "cp", "losetup", "mount", "umount", "e2fsck mkfs.ext4", "nbdcopy nbdinfo", "qemu-img qemu-io"];

#[test]
fn tools_that_tests_start_are_installed_by_the_setup() {
    let setup = fs::read_to_string(root().join("scripts/setup")).expect("it is there");
    let is_installed = |tool: &str| setup.lines().any(|line| line.trim_start().starts_with(&format!("\"{tool} ")));
    let is_known = |tool: &str| {
        let entry = COMES_WITH.iter().find(|entry| entry.split(' ').next() == Some(tool));
        entry.map_or_else(|| is_installed(tool), |entry| entry.split(' ').nth(1).is_none_or(is_installed))
    };
    // Of Ceph the bench says what is missing.
    let asked_for = rust().into_iter().filter(|source| !source.is_in(&["bench/src/compare/ceph.rs"]));
    let missing = asked_for.flat_map(|source| {
        let after = source.text.split("tool(\"").skip(1).filter_map(|rest| rest.split('"').next().map(str::to_string));
        let unknown = after.filter(|tool| !tool.contains(' ') && !is_known(tool)).collect::<Vec<_>>();
        unknown.into_iter().map(move |tool| format!("{}: {tool}", source.path))
    });
    assert_none("a tool that scripts/setup does not install", missing);
}

#[test]
fn tests_that_a_table_names_exist() {
    let readme = fs::read_to_string(root().join("tests/README.md")).expect("the tests have a README");
    let rows = readme.lines().filter(|line| line.starts_with('|'));
    let is_name = |word: &&str| {
        word.contains('_')
            && word.chars().all(|letter| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '_')
    };
    let named: Vec<&str> = rows.flat_map(|row| row.split('`').skip(1).step_by(2)).filter(is_name).collect();
    assert!(named.len() > 50, "{} names found", named.len());
    let of_code = sources(&|path| path.extension().is_some_and(|extension| extension == "rs" || extension == "mutant"));
    let exists = |name: &str| {
        let function = format!("fn {name}(");
        let is_file = |source: &Source| Path::new(&source.path).file_stem().is_some_and(|stem| stem == name);
        of_code.iter().any(|source| is_file(source) || source.text.contains(&function))
    };
    let missing = named.iter().filter(|name| !exists(name)).map(|name| name.to_string());
    assert_none("tests/README.md names these, and there are none", missing);
}

#[test]
fn nothing_mentions_material_that_is_not_in_the_repository() {
    let private = ["/work", "/shared"].concat();
    let text_file = |path: &Path| {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        !matches!(name.as_str(), "Cargo.lock" | ".git")
    };
    let mentions = |source: &Source| source.text.contains(&private).then(|| source.path.clone());
    assert_none("cite what a reader can open", sources(&text_file).iter().filter_map(mentions));
}
