//! One rule of a command allow-list: a program, and the shape of its arguments.
//!
//! ```text
//!  clone        exactly this word
//!  https://*    * stands for any characters of one argument, also none, but in an argument with '..' or '/./' for nothing
//!  **           at the end: any further arguments that are no options
//!  -**          at the end: any further arguments at all
//!  \*           a star (and \\ a backslash)
//! ```
//!
//! Invariant: nothing that begins with a dash is ever matched by a wildcard that does not begin with a dash itself. With most
//! programs one option is enough to do anything (`--upload-pack=…`), so options are allowed by name, or all at once.

use std::fmt;
use std::str::FromStr;

use nido_api::error::{Code, Error};
use serde::{Deserialize, Serialize};

use super::Command;

/// The default user of a command.
const DEFAULT_USER: &str = "root";

/// One rule. What it does not mention is not allowed, but for the user and the working directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// The program: an absolute path, or a bare name that the guest finds in its own `PATH`.
    pub program: Program,
    /// The shape of its arguments; none if absent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<Arg>,
    /// Names of the variables that the caller may set.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<Variable>,
    /// Users it may run as; any user if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub users: Option<Vec<String>>,
}

/// What of a command a rule does not allow. The further it got, the nearer the rule was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Mismatch {
    /// Another program.
    Program,
    /// Other arguments.
    Arguments,
    /// A user it may not run as.
    User,
    /// A variable that the caller may not set.
    Environment,
}

impl Rule {
    /// Whether the rule allows this, and if not, why.
    pub(super) fn check(&self, command: &Command<'_>) -> Result<(), Mismatch> {
        let Some((program, args)) = command.argv.split_first() else { return Err(Mismatch::Program) };
        if program != self.program.0.as_bytes() {
            return Err(Mismatch::Program);
        }
        if !shaped(&self.args, args) {
            return Err(Mismatch::Arguments);
        }
        let user = command.user.unwrap_or(DEFAULT_USER);
        if self.users.as_ref().is_some_and(|users| !users.iter().any(|allowed| allowed == user)) {
            return Err(Mismatch::User);
        }
        let may_be_set = |pair: &Vec<u8>| {
            let name = pair.iter().position(|b| *b == b'=').map(|at| &pair[..at]);
            self.env.iter().any(|allowed| name == Some(allowed.0.as_bytes()))
        };
        if command.env.iter().all(may_be_set) { Ok(()) } else { Err(Mismatch::Environment) }
    }
}

/// Whether arguments have this shape.
fn shaped(shape: &[Arg], args: &[Vec<u8>]) -> bool {
    let (words, rest) = match shape.split_last() {
        Some((last @ (Arg::Rest | Arg::RestWithOptions), words)) => (words, Some(last)),
        _ => (shape, None),
    };
    if args.len() < words.len() || (rest.is_none() && args.len() > words.len()) {
        return false;
    }
    let (first, further) = args.split_at(words.len());
    let fits = |(word, arg): (&Arg, &Vec<u8>)| matches!(word, Arg::Word(pieces) if matches(pieces, arg));
    words.iter().zip(first).all(fits)
        && (rest == Some(&Arg::RestWithOptions) || !further.iter().any(|arg| is_option(arg)))
}

fn is_option(arg: &[u8]) -> bool {
    arg.first() == Some(&b'-')
}

/// Whether an argument has a part that denotes another directory than its text: `..`, or `.` within a path.
fn leads_elsewhere(arg: &[u8]) -> bool {
    let mut parts = arg.split(|b| matches!(b, b'/' | b'=' | b':'));
    parts.any(|part| part == b".." || (part == b"." && arg.contains(&b'/')))
}

/// Whether an argument is made of these pieces.
fn matches(pieces: &[ArgumentPart], arg: &[u8]) -> bool {
    let has_wildcard = pieces.contains(&ArgumentPart::Any);
    if has_wildcard && (leads_elsewhere(arg) || (pieces.first() == Some(&ArgumentPart::Any) && is_option(arg))) {
        return false;
    }
    let Some((ArgumentPart::Text(head), pieces)) = pieces.split_first() else { return within(pieces, arg) };
    arg.strip_prefix(head.as_bytes()).is_some_and(|arg| within(pieces, arg))
}

/// The same, where a wildcard comes first or nothing comes. Each text is looked for as early as it can stand, but the last one
/// at the end.
fn within(pieces: &[ArgumentPart], mut arg: &[u8]) -> bool {
    let Some((last, pieces)) = pieces.split_last() else { return arg.is_empty() };
    for piece in pieces {
        let ArgumentPart::Text(text) = piece else { continue };
        let text = text.as_bytes();
        let Some(at) = arg.windows(text.len().max(1)).position(|window| window.starts_with(text)) else { return false };
        arg = &arg[at + text.len()..];
    }
    match last {
        ArgumentPart::Any => true,
        ArgumentPart::Text(text) => arg.ends_with(text.as_bytes()),
    }
}

/// The shape of one argument, or of all that follow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Arg {
    /// One argument.
    Word(Vec<ArgumentPart>),
    /// Any further arguments that are no options.
    Rest,
    /// Any further arguments.
    RestWithOptions,
}

/// A piece of a word. Two texts, and two wildcards, never stand side by side, and no text is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ArgumentPart {
    /// These characters.
    Text(String),
    /// Any characters.
    Any,
}

impl TryFrom<String> for Arg {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        match text.as_str() {
            "**" => return Ok(Self::Rest),
            "-**" => return Ok(Self::RestWithOptions),
            _ => {}
        }
        let wrong = |why: &str| wrong(format!("'{}' is not a pattern of an argument: {why}", text.escape_debug()));
        let mut pieces = Vec::new();
        let mut chars = text.chars();
        while let Some(c) = chars.next() {
            let literal = match c {
                '*' if pieces.last() == Some(&ArgumentPart::Any) => {
                    return Err(
                        wrong("** must be a whole argument, and the last one").hint("write * for any characters")
                    );
                }
                '*' => {
                    pieces.push(ArgumentPart::Any);
                    continue;
                }
                '\\' => match chars.next() {
                    Some(escaped @ ('*' | '\\')) => escaped,
                    _ => return Err(wrong("a backslash must precede * or another backslash")),
                },
                plain => plain,
            };
            match pieces.last_mut() {
                Some(ArgumentPart::Text(text)) => text.push(literal),
                _ => pieces.push(ArgumentPart::Text(literal.into())),
            }
        }
        Ok(Self::Word(pieces))
    }
}

impl From<Arg> for String {
    fn from(arg: Arg) -> Self {
        arg.to_string()
    }
}

impl fmt::Display for Arg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rest => f.write_str("**"),
            Self::RestWithOptions => f.write_str("-**"),
            Self::Word(pieces) => pieces.iter().try_for_each(|piece| match piece {
                ArgumentPart::Any => f.write_str("*"),
                ArgumentPart::Text(text) => f.write_str(&text.replace('\\', "\\\\").replace('*', "\\*")),
            }),
        }
    }
}

/// A program as a rule names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Program(String);

impl TryFrom<String> for Program {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        let plain = |part: &str| !matches!(part, "" | "." | "..");
        let path = text.strip_prefix('/').map(|rest| rest.split('/').all(plain));
        if !path.unwrap_or_else(|| plain(&text) && !text.contains('/')) || text.contains('*') {
            let shown = text.escape_debug();
            return Err(wrong(format!(
                "'{shown}' is not a program: write an absolute path or a name, without wildcards"
            ))
            .hint("for example /usr/bin/git, or git"));
        }
        Ok(Self(text))
    }
}

impl From<Program> for String {
    fn from(program: Program) -> Self {
        program.0
    }
}

/// The name of a variable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Variable(String);

impl TryFrom<String> for Variable {
    type Error = Error;

    fn try_from(name: String) -> Result<Self, Error> {
        let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
        if name.is_empty() || !name.bytes().all(word) {
            let shown = name.escape_debug();
            return Err(wrong(format!("'{shown}' is not the name of a variable: letters, digits and _, no wildcards")));
        }
        Ok(Self(name))
    }
}

impl From<Variable> for String {
    fn from(variable: Variable) -> Self {
        variable.0
    }
}

/// As [`FromStr`] takes it, without users and variables.
impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.program.0)?;
        self.args.iter().try_for_each(|arg| write!(f, " {arg}"))
    }
}

/// `git clone https://* **`: a program and the shape of its arguments, blanks between them.
impl FromStr for Rule {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let mut words = text.split_ascii_whitespace().map(str::to_owned);
        let program = words.next().unwrap_or_default().try_into()?;
        let rule =
            Self { program, args: words.map(Arg::try_from).collect::<Result<_, _>>()?, env: vec![], users: None };
        rule.checked()
    }
}

impl Rule {
    /// The rule itself, if its parts go together.
    pub(super) fn checked(self) -> Result<Self, Error> {
        let early = self.args.iter().rev().skip(1).any(|arg| !matches!(arg, Arg::Word(_)));
        if early {
            Err(wrong(format!("of '{}': ** and -** must be last", self.program.0.escape_debug())))
        } else {
            Ok(self)
        }
    }
}

fn wrong(words: String) -> Error {
    Error::new(Code::SpecInvalid, words)
}

#[cfg(test)]
mod tests;
