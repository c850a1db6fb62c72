//! No file needs another that needs it back, in any crate: a file can be read once what it uses has been read.
//!
//! An arrow is a path in a file (`crate::…`, `super::…`, a child's name) to an item that another file of the crate defines. A
//! façade's `pub use` is none: it leads on to the file that it names. Nor is anything in a `mod tests` within a file. A call of a
//! method names no file, so methods of one type that lie in several files may call each other unseen.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, Result, anyhow, ensure};
use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// A module of a crate: the names from its root; none for the root.
type Module = Vec<String>;

/// The modules of a crate, and for each the modules whose items it names.
type Arrows = BTreeMap<Module, BTreeSet<Module>>;

/// A path in a file, and whether it is named by a `pub use`.
struct Named {
    path: Vec<String>,
    reexported: bool,
}

#[test]
fn no_crate_has_a_circle_of_files() -> Result<()> {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let manifest: toml::Table = std::fs::read_to_string(root.join("Cargo.toml"))?.parse()?;
    let members = manifest["workspace"]["members"].as_array().context("no members")?;
    for member in members.iter().filter_map(|member| member.as_str()) {
        let mut files = BTreeMap::new();
        read(&root.join(member).join("src"), &mut Vec::new(), &mut files)?;
        if let Some(circle) = circle(&arrows(&files)) {
            let names: Vec<_> = circle.iter().map(|module| module.join("::")).collect();
            return Err(anyhow!("{member}: a circle of files: {}", names.join(" -> ")));
        }
    }
    Ok(())
}

#[test]
fn circles_are_seen() -> Result<()> {
    let check = |files: &[(&str, &str)], expected: Option<&[&str]>| -> Result<()> {
        let mut modules = BTreeMap::new();
        for (name, text) in files {
            let module = name.split("::").filter(|part| !part.is_empty()).map(str::to_owned).collect();
            modules.insert(module, TokenStream::from_str(text).map_err(|error| anyhow!("{name}: {error}"))?);
        }
        let found = circle(&arrows(&modules)).map(|circle| circle.iter().map(|m| m.join("::")).collect::<Vec<_>>());
        let expected = expected.map(|names| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
        ensure!(found == expected, "{files:?}: {found:?}");
        Ok(())
    };
    check(&[("", "mod a; mod b;"), ("a", "use crate::b::B;"), ("b", "struct B;")], None)?;
    check(
        &[("", "mod a; mod b;"), ("a", "use crate::b::B;"), ("b", "fn f() { crate::a::g() }")],
        Some(&["a", "b", "a"]),
    )?;
    check(&[("", "mod a; fn f() { a::g() }"), ("a", "use super::f;")], Some(&["", "a", ""]))?;
    check(&[("", "mod a; pub use a::{A, B};"), ("a", "struct A;")], None)?;
    let by_facade =
        [("", "mod a; mod b; pub(crate) use a::A;"), ("a", "use crate::b::B;"), ("b", "use crate::{A, x::Y};")];
    check(&by_facade, Some(&["a", "b", "a"]))?;
    check(&[("", "mod a; mod b;"), ("a", "use crate::b::B;"), ("b", "mod tests { use crate::a::A; }")], None)?;
    let three = [("a", "use crate::b;"), ("b", "use super::c::C;"), ("c", "fn f() -> crate::a::A {}"), ("", "")];
    check(&three, Some(&["a", "b", "c", "a"]))
}

/// The files below a folder of sources, by module.
fn read(folder: &Path, above: &mut Module, files: &mut BTreeMap<Module, TokenStream>) -> Result<()> {
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let name = path.file_stem().and_then(|name| name.to_str()).context("a name")?.to_owned();
        if path.is_dir() {
            if name != "bin" {
                above.push(name);
                read(&path, above, files)?;
                above.pop();
            }
            continue;
        }
        if path.extension().is_none_or(|extension| extension != "rs") {
            continue;
        }
        let mut module = above.clone();
        if !matches!(name.as_str(), "lib" | "main" | "mod") {
            module.push(name);
        }
        let text = std::fs::read_to_string(&path)?;
        let tokens = TokenStream::from_str(&text).map_err(|error| anyhow!("{}: {error}", path.display()))?;
        // A program's root and its library's are one here.
        files.entry(module).or_default().extend(tokens);
    }
    Ok(())
}

/// Follows every path in the files to the file that defines its item.
fn arrows(files: &BTreeMap<Module, TokenStream>) -> Arrows {
    let mut named: BTreeMap<&Module, Vec<Named>> = BTreeMap::new();
    for (module, tokens) in files {
        let children = files.keys().filter(|file| file.len() == module.len() + 1 && file.starts_with(module));
        let children: BTreeSet<&str> = children.filter_map(|child| child.last()).map(String::as_str).collect();
        let found = named.entry(module).or_default();
        names(tokens.clone(), &children, found);
        found.iter_mut().for_each(|named| named.path = absolute(module, &named.path));
    }
    let uses = |(module, found): (&&Module, &Vec<Named>)| {
        let used = found.iter().filter(|named| !named.reexported).map(|used| home(&used.path, &named, 0));
        ((*module).clone(), used.filter(|used| used != *module).collect())
    };
    named.iter().map(uses).collect()
}

/// The file in which the item of a path is defined, through façades.
fn home(path: &[String], named: &BTreeMap<&Module, Vec<Named>>, depth: usize) -> Module {
    let length = (0..=path.len()).rev().find(|length| named.contains_key(&path[..*length].to_vec())).unwrap_or(0);
    let (module, rest) = path.split_at(length);
    let reexports = named.get(&module.to_vec()).into_iter().flatten().filter(|named| named.reexported);
    let mut targets = reexports.filter(|named| rest.first().is_some_and(|item| named.path.last() == Some(item)));
    match targets.next() {
        Some(target) if depth < 10 => home(&[&target.path, &rest[1..]].concat(), named, depth + 1),
        _ => module.to_vec(),
    }
}

/// From the crate's root.
fn absolute(module: &[String], path: &[String]) -> Vec<String> {
    let ups = path.iter().take_while(|name| *name == "super").count();
    match path.first().map(String::as_str) {
        Some("crate") => path[1..].to_vec(),
        Some("self") => [module, &path[1..]].concat(),
        _ => [&module[..module.len().saturating_sub(ups)], &path[ups..]].concat(),
    }
}

/// Collects the paths within the crate that tokens name.
fn names(tokens: TokenStream, children: &BTreeSet<&str>, found: &mut Vec<Named>) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    let is_colon = |at: usize| matches!(tokens.get(at), Some(TokenTree::Punct(punct)) if punct.as_char() == ':');
    let mut at = 0;
    while at < tokens.len() {
        match &tokens[at] {
            TokenTree::Ident(word) if *word == "mod" && matches!(tokens.get(at + 2), Some(TokenTree::Group(_))) => {
                at += 3
            }
            TokenTree::Ident(word)
                if (["crate", "super", "self"].iter().any(|root| word == root)
                    || children.contains(word.to_string().as_str()))
                    && is_colon(at + 1)
                    && is_colon(at + 2)
                    && !(at >= 2 && is_colon(at - 1) && is_colon(at - 2)) =>
            {
                let reexported = at > 0
                    && matches!(&tokens[at - 1], TokenTree::Ident(word) if *word == "use")
                    && tokens[..at - 1].iter().rev().take(2).any(|token| token.to_string() == "pub");
                let mut paths = Vec::new();
                at = path(&tokens, at, &[], &mut paths);
                found.extend(paths.into_iter().map(|path| Named { path, reexported }));
            }
            TokenTree::Group(group) => {
                names(group.stream(), children, found);
                at += 1;
            }
            _ => at += 1,
        }
    }
}

/// Reads a path with its groups of braces, from `at` on; gives where it ends.
fn path(tokens: &[TokenTree], mut at: usize, before: &[String], paths: &mut Vec<Vec<String>>) -> usize {
    let mut names = before.to_vec();
    loop {
        match tokens.get(at) {
            Some(TokenTree::Ident(name)) => names.push(name.to_string()),
            Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Brace => {
                let inner: Vec<TokenTree> = group.stream().into_iter().collect();
                let is_comma = |token: &TokenTree| matches!(token, TokenTree::Punct(punct) if punct.as_char() == ',');
                for item in inner.split(is_comma).filter(|item| !item.is_empty()) {
                    path(item, 0, &names, paths);
                }
                return at + 1;
            }
            _ => break,
        }
        at += 1;
        let next = tokens.get(at..at + 2).is_some_and(|colons| colons.iter().all(|colon| colon.to_string() == ":"));
        if !next {
            break;
        }
        at += 2;
    }
    paths.push(names);
    at
}

/// A circle, its first module also as the last, if there is one.
fn circle(arrows: &Arrows) -> Option<Vec<Module>> {
    let mut clear = BTreeSet::new();
    arrows.keys().find_map(|module| walk(module, arrows, &mut Vec::new(), &mut clear))
}

fn walk(module: &Module, arrows: &Arrows, way: &mut Vec<Module>, clear: &mut BTreeSet<Module>) -> Option<Vec<Module>> {
    if let Some(at) = way.iter().position(|before| before == module) {
        return Some(way[at..].iter().chain([module]).cloned().collect());
    }
    if clear.contains(module) {
        return None;
    }
    way.push(module.clone());
    let found = arrows.get(module).into_iter().flatten().find_map(|used| walk(used, arrows, way, clear));
    way.pop();
    clear.insert(module.clone());
    found
}
