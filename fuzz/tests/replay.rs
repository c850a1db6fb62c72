//! Seeds, and inputs that once broke a target, break it no more.

use std::path::PathBuf;

use millstream_fuzz::TARGETS;

fn inputs(of: &str, target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(of).join(target);
    let Ok(files) = std::fs::read_dir(&folder) else { return Vec::new() };
    files
        .map(|file| file.expect("a folder that can be listed").path())
        .map(|path| (path.clone(), std::fs::read(path).expect("a file that can be read")))
        .collect()
}

/// A panic's output names the input.
struct Named<'a>(&'a str, &'a PathBuf);

impl Drop for Named<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the target {} breaks on {}", self.0, self.1.display());
        }
    }
}

#[test]
fn no_known_input_breaks_a_target() {
    for (name, target) in TARGETS {
        let seeds = inputs("seeds", name);
        assert!(!seeds.is_empty(), "{name} has no seeds");
        for (path, input) in seeds.iter().chain(&inputs("crashes", name)) {
            let _named = Named(name, path);
            target(input);
            // Cut and damaged, too.
            target(&input[..input.len() / 2]);
        }
    }
}
